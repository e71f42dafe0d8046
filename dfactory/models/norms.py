"""RMSNorm on a CPU: in bfloat16 with its own backward pass, in float32 without a gradient as one call.

Written out in torch, a norm converts its input to float32 and walks through it seven times, and its gradient a dozen times,
each time through memory. Here both walk through blocks of rows that stay in the cache, and nothing is kept in float32 but
the inverse root of each row. With n = x r the normalised row of H numbers and w the weight:

    y = w n      dw = sum over rows of dy n      dx = r (w dy - n mean(w dy n))

The forward rounds as transformers does: n to bfloat16, then the product. The backward pass is in float32 and rounds once.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from dfactory.models import modes

BLOCK = 2**17  # numbers of a block
ON = {"cpu"}  # devices where this is used; on CUDA there are Liger's kernels (fused.py)


class _Norm:
    """The further modes of a norm on a CPU: for training in bfloat16, and without a gradient in float32, where torch's own
    norm gives the same bits in two thirds of the time."""

    def forward(self, hidden_states):
        if not torch.is_grad_enabled() and hidden_states.dtype == torch.float32 and hidden_states.device.type in ON:
            return torch.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        trains = torch.is_grad_enabled() and hidden_states.requires_grad
        if not trains or hidden_states.dtype != torch.bfloat16 or hidden_states.device.type not in ON:
            return super().forward(hidden_states)
        return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class RMSNorm(torch.autograd.Function):
    """hidden [..., H] and weight [H] in bfloat16 -> [..., H]."""

    @staticmethod
    def forward(ctx, hidden, weight, epsilon):
        rows = hidden.reshape(-1, hidden.shape[-1])
        out, roots = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for block in _blocks(rows):
            wide = rows[block].float()
            root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            torch.mul(weight, wide.mul_(root).to(rows.dtype), out=out[block])
            roots[block] = root
        ctx.save_for_backward(hidden, weight, roots)
        return out.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        hidden, weight, roots = ctx.saved_tensors
        rows, grads, wide_weight = (
            hidden.reshape(-1, hidden.shape[-1]),
            grad_out.reshape(-1, len(weight)),
            weight.float(),
        )
        grad_rows, grad_weight = torch.empty_like(rows), torch.zeros_like(wide_weight)
        for block in _blocks(rows):
            normal, grad = rows[block].float().mul_(roots[block]), grads[block].float()
            product = grad * normal
            grad_weight += product.sum(dim=0)
            mean = (product @ wide_weight).div_(len(weight))
            grad_rows[block] = grad.mul_(wide_weight).addcmul_(normal, mean[:, None], value=-1).mul_(roots[block])
        return grad_rows.view_as(hidden), grad_weight.to(weight.dtype), None


def _blocks(rows: torch.Tensor) -> list[slice]:
    count = max(1, BLOCK // rows.shape[1])
    return [slice(start, start + count) for start in range(0, len(rows), count)]


def adopt(model: nn.Module) -> None:
    """Add the second mode to the norms that compute what it does."""
    for module in model.modules():
        if "weight" in module._parameters and hasattr(module, "variance_epsilon") and _is_plain(module):
            modes.give(module, _Norm)


def _is_plain(norm: nn.Module) -> bool:
    """Whether a norm gives the same bits on a small input."""
    generator = torch.Generator().manual_seed(0)
    *hidden, weight = torch.randn(5, 32, generator=generator, device="cpu").bfloat16()
    hidden = torch.stack(hidden)
    with torch.no_grad():
        expected = functional_call(norm, {"weight": weight}, (hidden,))
        whole = functional_call(norm, {"weight": weight.float()}, (hidden.float(),))
        at_once = torch.rms_norm(hidden.float(), weight.shape, weight.float(), norm.variance_epsilon)
        same = torch.equal(expected, RMSNorm.apply(hidden, weight, norm.variance_epsilon))
        return same and torch.equal(whole, at_once)
