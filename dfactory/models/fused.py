"""RMSNorm and SwiGLU as Liger's fused kernels (recipe key `use_liger_kernel`), for training on CUDA.

Written out in torch, a norm walks through its rows seven times and keeps two copies for the backward pass; fused, once
and one. Liger's own patch goes by model_type and does not know Glm4Moe, so modules are known by what they hold. Experts
that AutoEP has replaced keep DeepSpeed's arithmetic.
"""

import torch
from torch import nn
from transformers.activations import SiLUActivation

from dfactory.errors import ConfigError
from dfactory.models import modes


class _Norm:
    def forward(self, hidden_states):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # `llama`: the root in fp32, the product with the weight in the stream's precision, as transformers has it
        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


class _Mlp:
    def forward(self, x):
        return self.down_proj(_silu_mul(self.gate_proj(x), self.up_proj(x)))


class _Experts:
    def _apply_gate(self, gate_up_PI: torch.Tensor) -> torch.Tensor:
        return _silu_mul(*gate_up_PI.chunk(2, dim=-1))


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())


def fuse(model: nn.Module) -> None:
    """Make a model's norms and gated products run fused, in place. Raises ConfigError where that cannot be."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "use_liger_kernel: Liger's kernels need a CUDA device, and this machine has none; set it to false"
        )
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError as problem:
        raise ConfigError(
            f"use_liger_kernel: {problem}; pip install 'dfactory[liger]', or set it to false"
        ) from problem
    for module in model.modules():
        mode = _mode(module)
        if mode is not None:
            modes.give(module, mode)


def _mode(module: nn.Module) -> type | None:
    if type(module).__name__.endswith("RMSNorm"):
        return _Norm
    if not isinstance(getattr(module, "act_fn", None), SiLUActivation):
        return None
    if hasattr(module, "gate_up_proj"):
        return _Experts
    return _Mlp if {"gate_proj", "up_proj", "down_proj"} <= set(module._modules) else None
