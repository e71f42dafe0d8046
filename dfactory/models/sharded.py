"""Weights that ZeRO-3 has sharded, made whole for a moment."""

import contextlib

from torch import nn


def whole(weight: nn.Parameter) -> contextlib.AbstractContextManager:
    """A context in which a weight that ZeRO-3 has sharded is whole; what is written there is kept."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
