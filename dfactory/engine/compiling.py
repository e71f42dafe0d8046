"""`torch_compile`: the layers of a model as compiled code, for training.

Compiled is what stands around a layer's attention and experts: norms, projections, rotary embedding, gates, sums. Attention
under the visibility rule and routed experts stay as they are, because they depend on numbers of a batch and have kernels of
their own; each is a break in a layer's graph. Shapes are symbolic from the start, so that another length compiles nothing.
The last layer, which runs at targets alone, and forwards with a cache (decoding) are not compiled. Modules and tensor names
stay.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

from dfactory.errors import ConfigError
from dfactory.models import attention, experts, modes
from dfactory.models.families.base import Attention
from dfactory.models.policy import Policy

GRAPHS = 8  # of one piece of code; with more kinds of input it runs as it is


class _Compiled:
    """The second mode of a layer."""

    compiled_by: tuple[str, str | None]  # backend and mode

    def forward(self, *args, **kwargs):
        if kwargs.get("past_key_values") is not None:
            return super().forward(*args, **kwargs)
        return _compiled(self.family, *self.compiled_by)(self, *args, **kwargs)


@functools.cache
def _compiled(family: type[nn.Module], backend: str, mode: str | None) -> Callable:
    """The forward of all layers of a class, their weights being arguments."""
    return torch.compile(family.forward, dynamic=True, backend=backend, mode=mode)


def compile_layers(policy: Policy, backend: str, mode: str | None) -> str:
    """Compile a model's layers at their first use. Returns what a run tells of it. Raises ConfigError for causal context."""
    if policy.family.attention is Attention.CAUSAL_CONTEXT:
        raise ConfigError(
            f"torch_compile true: layers of the model family {policy.family.name} compute views and clean text apart, and "
            "have not been compiled yet; set it to false"
        )
    torch._dynamo.config.recompile_limit = GRAPHS
    AttentionInterface.register(attention.ATTENTION, torch.compiler.disable(attention.attention_function))
    ExpertsInterface.register(experts.EXPERTS, torch.compiler.disable(experts.experts_function))
    layers = policy.layers[:-1] if policy.ends_at_targets else policy.layers
    for layer in layers:
        modes.give(layer, _Compiled)
        layer.compiled_by = (backend, mode)
    return (
        f"torch_compile: {len(layers)} of {len(policy.layers)} layers, by {backend} at their first use; at most {GRAPHS} "
        "graphs for each piece of their code, beyond which it runs as it is"
    )
