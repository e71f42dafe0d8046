"""Attention of consecutive queries to chosen keys on a CPU, part after part, as one autograd function.

Every part goes through torch's flash kernel for CPUs. As operations of autograd, the dozens of parts of a layer would each
add nodes to the graph, keep copies of their keys and values, and join results and gradients through further copies. Here
results and gradients are written to their place, and the backward pass gathers keys again.

Letters: R packed sequences, S their length, S' the length of the keys, Q queries and K keys of a part, d size of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Consecutive queries of a row and the keys that they see, which are in a row of their own numbering."""

    query_row: int
    queries: slice
    key_row: int
    keys: torch.Tensor | slice
    bias: torch.Tensor | None  # float32 [Q, K]: 0, and -inf where a query does not see a key; None: all see all


def suits(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's kernel takes such heads."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Sequence[Part],
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """query [R, heads, S, d], key and value [R', kv heads, S', d] -> [R, S, heads, d] in their precision, computed in
    `dtype`; zeros where no part is."""
    return _Attention.apply(query, key, value, parts, scaling, dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, parts, scaling, dtype):
        rows, heads, length, size = query.shape
        out = query.new_zeros(rows, length, heads, size)
        wide, kept = [_contiguous(tensor, dtype) for tensor in (query, key, value)], []
        for part in parts:
            attended, log_sums = _FLASH(*_taken(part, *wide), attn_mask=_bias(part, wide[0]), scale=scaling)
            out[part.query_row, part.queries] = attended[0].transpose(0, 1)
            kept += [attended, log_sums]
        ctx.save_for_backward(*wide, *kept)
        ctx.parts, ctx.scaling, ctx.dtype = parts, scaling, query.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        saved = iter(ctx.saved_tensors)
        wide = [next(saved) for _ in range(3)]
        totals = [torch.zeros_like(tensor) for tensor in wide]
        for part, attended, log_sums in zip(ctx.parts, saved, saved, strict=True):
            grad = grad_out[part.query_row, part.queries].transpose(0, 1)[None].to(attended.dtype)
            forward = (*_taken(part, *wide), attended, log_sums, 0.0, False)
            grads = _FLASH_BACKWARD(grad, *forward, attn_mask=_bias(part, wide[0]), scale=ctx.scaling)
            totals[0][part.query_row, :, part.queries] = grads[0][0]
            for total, more in zip(totals[1:], grads[1:], strict=True):
                _add_at(total[part.key_row], part.keys, more[0])
        return *(total.to(ctx.dtype) for total in totals), None, None, None


def _contiguous(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A gather of keys would copy all of a tensor that is not contiguous."""
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _taken(part: Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[1, heads, Q, d], [1, kv heads, K, d] twice."""
    keys = [
        tensor[part.key_row, :, part.keys]
        if isinstance(part.keys, slice)
        else tensor[part.key_row].index_select(1, part.keys)
        for tensor in (key, value)
    ]
    return query[part.query_row, None, :, part.queries], *(seen[None] for seen in keys)


def _bias(part: Part, like: torch.Tensor) -> torch.Tensor | None:
    return None if part.bias is None else part.bias[None, None].to(like.dtype)


def _add_at(total: torch.Tensor, keys: torch.Tensor | slice, more: torch.Tensor) -> None:
    """total [kv heads, S', d] at the keys += more [kv heads, K, d]."""
    if isinstance(keys, slice):
        total[:, keys] += more
    else:
        total.index_add_(1, keys, more)
