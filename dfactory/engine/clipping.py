"""Clips the gradients of embedding and head by their own norm, before the engine clips all gradients by theirs.

    g_ends  *=  min(1, embedding_max_grad_norm / |g_ends|)        then        g  *=  min(1, max_grad_norm / |g|)

DeepSpeed clips by one norm. Between the last backward pass and the step its optimisers hold gradients that are averaged over
the ranks, in shards that this scales in place.
"""

from collections.abc import Sequence

import torch
from deepspeed.utils import safe_get_full_grad, safe_set_full_grad
from torch import nn

TINY = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def clip_together(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients of these parameters so that their norm over all of them is `max_norm` at most. Returns the norm
    before. All ranks must call it, at the end of a global batch; a NaN stays one, so that the step is skipped."""
    norm = torch.stack([torch.linalg.vector_norm(safe_get_full_grad(one).float()) for one in parameters]).norm()
    scale = (max_norm / (norm + TINY)).clamp(max=1.0)
    for parameter in parameters:
        _scale(parameter, scale)
    return norm


def _scale(parameter: nn.Parameter, scale: torch.Tensor) -> None:
    """Multiply what the optimiser will read. A parameter's fragment may lie on other ranks."""
    if hasattr(parameter, "ds_id"):  # ZeRO 3
        safe_set_full_grad(parameter, safe_get_full_grad(parameter) * scale)
    elif hasattr(parameter, "_hp_grad"):  # ZeRO 1 in bfloat16: every rank keeps all of it
        parameter._hp_grad.mul_(scale)
    elif not hasattr(parameter, "_hp_mapping"):  # no ZeRO
        parameter.grad.mul_(scale)
    elif parameter._hp_mapping is not None:
        parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).mul_(scale)
