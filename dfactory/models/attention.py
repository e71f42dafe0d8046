"""Attention under the visibility rule, in three equivalent forms: segments, flex_attention, a dense mask.

A plan is made once for a batch of places and used by every layer. transformers' models pass it as the keyword
`visibility` to the attention function that is registered here under the name ATTENTION.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dfactory.errors import ConfigError
from dfactory.models import cpu_attention
from dfactory.types import PADDING, Place
from dfactory.visibility import dense_mask, flex_mask_mod, visible

ATTENTION = "dfactory_visibility"  # the attention implementation in a model's config

CHUNK = 64  # queries in one attention call of the segment plan
DENSE_BELOW = 512  # up to this length one masked call is faster than many small ones
DENSE_LIMIT = 4096  # a dense mask of a longer sequence is refused
FLOAT32_ON = {"cpu"}  # devices where torch's backward pass is several times slower in bfloat16 than in float32


class AttentionPlan(Protocol):
    """Computes attention with the visibility of one batch."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query [R, heads, S, d], key and value [R, kv heads, S', d] -> [R, S, heads, d]."""

    def at(self, chosen_N: torch.Tensor, shape: tuple[int, int]) -> "AttentionPlan":
        """The plan for the queries at some positions only, ascending indices into the flattened [R, S] of `shape`: query
        [1, heads, N, d], the same keys and values -> [1, N, heads, d]."""


def plan_attention(place_RS: Place, implementation: str = "auto", window: int | None = None) -> AttentionPlan:
    """The plan for self-attention among `place_RS`, on the device of the places; `window`: of a layer with a sliding window.

    `auto` is flex_attention on CUDA and segments elsewhere. Raises ConfigError for a dense mask above DENSE_LIMIT.
    """
    length = place_RS.document.shape[1]
    if implementation == "auto":
        implementation = "flex" if place_RS.document.is_cuda else "segments"
    if implementation == "flex":
        return FlexPlan.of(place_RS, window)
    if implementation == "segments" and length > DENSE_BELOW:
        return SegmentPlan.of(place_RS, window=window)
    if length > DENSE_LIMIT:
        raise ConfigError(
            f"attn_implementation dense with sequences of {length}: it is for tests, up to {DENSE_LIMIT}; "
            "use segments or flex"
        )
    return MaskPlan(dense_mask(place_RS, window))


class PlanByLayer:
    """The plans of a model whose layers differ in their sliding window (None: a layer without one). Each is made when the
    first layer asks for it."""

    def __init__(self, noised_RS: torch.Tensor, plan: Callable[[int | None], AttentionPlan]):
        self.noised_RS = noised_RS  # bool: which tokens are in a view
        self.within = functools.cache(plan)

    @classmethod
    def of(cls, place_RS: Place, implementation: str) -> "PlanByLayer":
        return cls(place_RS.view > 0, lambda window: plan_attention(place_RS, implementation, window))


def _attention(query, key, value, mask, scaling):
    """SDPA with grouped key/value heads. Queries that see nothing get zeros."""
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


def _as_computed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the precision in which attention is computed."""
    dtype = _computed_dtype(tensors[0])
    return tuple(tensor.to(dtype) for tensor in tensors)


def _computed_dtype(tensor: torch.Tensor) -> torch.dtype:
    slow = tensor.dtype == torch.bfloat16 and tensor.device.type in FLOAT32_ON
    return torch.float32 if slow else tensor.dtype


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """A boolean mask [R, S, S'], for short sequences and for decoding, where S' includes the cached keys."""

    mask_RSS: torch.Tensor

    def attend(self, query, key, value, scaling):
        attended = _attention(*_as_computed(query, key, value), self.mask_RSS[:, None], scaling)
        return attended.transpose(1, 2).to(query.dtype)

    def at(self, chosen_N, shape):
        return ChosenSegments.of(
            [[Chunk(slice(0, shape[1]), slice(None), mask_SS)] for mask_SS in self.mask_RSS], chosen_N, shape[1]
        )


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive queries of a packed sequence, the keys that any of them sees, and the mask between them (None: all see
    all)."""

    queries: slice
    keys: torch.Tensor | slice | None  # None: padding
    mask: torch.Tensor | None

    @property
    def seen(self) -> torch.Tensor | slice:
        """The keys of the attention call. Padding sees none and gets one, whose result is discarded."""
        return slice(0, 1) if self.keys is None else self.keys


@dataclasses.dataclass(frozen=True)
class SegmentPlan:
    """Exact attention that computes only visible pairs, with the granularity of a chunk.

    Visibility depends on (document, view, block) only. So a packed sequence is split into segments of equal place, and the
    rule is evaluated once per pair of segments. A chunk is up to CHUNK queries in whole segments; it attends to the union of
    the keys that its segments see, under a mask.
    """

    chunks_by_row: list[list[Chunk]]

    @functools.cached_property
    def parts(self) -> list[cpu_attention.Part]:
        return [part for row, chunks in enumerate(self.chunks_by_row) for part in _parts(chunks, row, row)]

    @classmethod
    def of(cls, place_RS: Place, chunk: int = CHUNK, window: int | None = None) -> "SegmentPlan":
        device = place_RS.document.device
        rows = Place(*(field.cpu().numpy() for field in place_RS))
        return cls([_chunks(rows.at(row), chunk, device, window) for row in range(rows.document.shape[0])])

    def attend(self, query, key, value, scaling):
        if cpu_attention.suits(query, value):
            return cpu_attention.attend(query, key, value, self.parts, scaling, _computed_dtype(query))
        # unbind and split instead of slices: their gradients are joined in one operation, while the gradient of every
        # single slice would be a tensor of the size of the whole batch.
        parts = (tensor.unbind() for tensor in _as_computed(query, key, value))
        rows = []
        for chunks, *row in zip(self.chunks_by_row, *parts, strict=True):
            rows.append(torch.cat(_attend_row(chunks, *row, scaling), dim=1))
        return torch.stack(rows).transpose(1, 2).to(query.dtype)

    def at(self, chosen_N, shape):
        return ChosenSegments.of(self.chunks_by_row, chosen_N, shape[1])


@dataclasses.dataclass(frozen=True)
class ChosenSegments:
    """The chunks of all packed sequences, restricted to a few queries, which are concatenated over the sequences."""

    chunks_by_row: list[list[Chunk]]
    queries_R: list[int]

    @functools.cached_property
    def parts(self) -> list[cpu_attention.Part]:
        starts = itertools.accumulate(self.queries_R[:-1], initial=0)
        rows = enumerate(zip(self.chunks_by_row, starts, strict=True))
        return [part for row, (chunks, start) in rows for part in _parts(chunks, 0, row, start)]

    @classmethod
    def of(cls, chunks_by_row: list[list[Chunk]], chosen_N: torch.Tensor, length: int) -> "ChosenSegments":
        chosen = chosen_N.cpu().numpy()
        if (chosen[1:] < chosen[:-1]).any():
            raise ValueError("target_index_N must ascend through the flattened [R, S]: sort it")
        ends_R = np.searchsorted(chosen, length * np.arange(len(chunks_by_row) + 1))
        rows = [chosen[a:b] % length for a, b in itertools.pairwise(ends_R)]
        chunks = [_chosen(*row, chosen_N.device) for row in zip(chunks_by_row, rows, strict=True)]
        return cls(chunks, np.diff(ends_R).tolist())

    def attend(self, query, key, value, scaling):
        if cpu_attention.suits(query, value):
            return cpu_attention.attend(query, key, value, self.parts, scaling, _computed_dtype(query))
        (queries,), keys, values = _as_computed(query, key, value)
        parts = (queries.split(self.queries_R, dim=1), keys.unbind(), values.unbind())
        rows = zip(self.chunks_by_row, *parts, strict=True)
        parts = [part for chunks, *row in rows if chunks for part in _attend_row(chunks, *row, scaling)]
        return torch.cat(parts, dim=1)[None].transpose(1, 2).to(query.dtype)


def _parts(chunks: list[Chunk], query_row: int, key_row: int, start: int = 0) -> Iterator[cpu_attention.Part]:
    """The chunks of a row but padding, whose queries are numbered from `start` on."""
    for c in chunks:
        if c.keys is not None:
            queries = slice(start + c.queries.start, start + c.queries.stop)
            bias = None if c.mask is None else torch.zeros(c.mask.shape).masked_fill_(~c.mask, -torch.inf)
            yield cpu_attention.Part(query_row, queries, key_row, c.keys, bias)


def _chosen(chunks: list[Chunk], query_N: np.ndarray, device: torch.device) -> list[Chunk]:
    """The chunks of one sequence, restricted to some of its queries, which are renumbered from 0."""
    left = []
    for c in chunks:
        first, last = np.searchsorted(query_N, (c.queries.start, c.queries.stop)).tolist()
        if first < last:
            index = torch.from_numpy(query_N[first:last] - c.queries.start).to(device)
            left.append(Chunk(slice(first, last), c.keys, None if c.mask is None else c.mask[index]))
    return left


def _attend_row(chunks: list[Chunk], query, key, value, scaling) -> list[torch.Tensor]:
    """query [heads, S, d], key and value [kv heads, S, d] -> [heads, queries, d] for each chunk."""
    parts = []
    queries = query.split([c.queries.stop - c.queries.start for c in chunks], dim=1)
    for c, q, k, v in zip(chunks, queries, _Seen.apply(key, chunks), _Seen.apply(value, chunks), strict=True):
        part = _attention(q[None], k[None], v[None], c.mask, scaling)[0]
        # Padding sees nothing, so its result is zero. It is computed from a key, because ZeRO-3 needs a graph to the
        # parameters also for sequences that are all padding.
        parts.append(part * 0 if c.keys is None else part)
    return parts


class _Seen(torch.autograd.Function):
    """Keys or values [kv heads, S, d] -> those that each chunk sees. Their gradients are summed in one tensor of that
    shape; autograd by itself would make one for every chunk."""

    @staticmethod
    def forward(ctx, key, chunks):
        ctx.chunks, ctx.shape = chunks, key.shape
        key = key.contiguous()  # index_select would copy all of a tensor that is not, once for every chunk
        return tuple(key[:, c.seen] if isinstance(c.seen, slice) else key.index_select(1, c.seen) for c in chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        total = gradients[0].new_zeros(ctx.shape)
        for c, gradient in zip(ctx.chunks, gradients, strict=True):
            if isinstance(c.seen, slice):
                total[:, c.seen] += gradient
            else:
                total.index_add_(1, c.seen, gradient)
        return total, None


def _chunks(place_S: Place, chunk: int, device: torch.device, window: int | None) -> list[Chunk]:
    """The chunks of one packed sequence: segments are merged while they hold at most `chunk` queries. A single longer
    segment is a chunk of its own, and padding is never merged with tokens."""
    length = len(place_S.document)
    changes = np.zeros(length, dtype=bool)
    changes[0] = True
    for field in place_S:
        changes[1:] |= field[1:] != field[:-1]
    starts = np.flatnonzero(changes)
    sizes = np.diff(starts, append=length)
    segment = place_S.at(starts)

    chunks, first = [], 0
    while first < len(starts):
        last = first + 1
        padding = segment.document[first] == PADDING
        while last < len(starts) and starts[last] + sizes[last] - starts[first] <= chunk:
            if (segment.document[last] == PADDING) != padding:
                break
            last += 1
        queries = slice(int(starts[first]), int(starts[last - 1] + sizes[last - 1]))
        if padding:
            chunks.append(Chunk(queries, None, None))
        else:
            here = Place(*(field[first:last, None] for field in segment))
            # [segments of the chunk, all segments]
            sees = visible(here, Place(*(field[None] for field in segment)), window)
            seen = np.flatnonzero(sees.any(axis=0))
            keys = np.flatnonzero(np.repeat(sees.any(axis=0), sizes))
            mask = np.repeat(
                np.repeat(sees[:, seen], sizes[first:last], axis=0), sizes[seen], axis=1
            )  # [queries, keys]
            chunks.append(Chunk(queries, _as_slice(keys, device), _as_mask(mask, device)))
        first = last
    return chunks


def _as_slice(index: np.ndarray, device: torch.device) -> torch.Tensor | slice:
    """A slice if the indices are consecutive, which needs no gather; else the indices."""
    if index[-1] - index[0] + 1 == len(index):
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index).to(device)


def _as_mask(mask: np.ndarray, device: torch.device) -> torch.Tensor | None:
    return None if mask.all() else torch.from_numpy(mask).to(device)


@dataclasses.dataclass(frozen=True)
class FlexPlan:
    """torch's compiled flex_attention over a block mask; for GPUs."""

    block_mask: "torch.nn.attention.flex_attention.BlockMask"

    @classmethod
    def of(cls, place_RS: Place, window: int | None = None) -> "FlexPlan":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = place_RS.document.shape
        device = place_RS.document.device
        # Compiled, the mask function runs tile by tile; eager, torch would materialise all of [R, S, S] first.
        compiled = device.type == "cuda"
        return cls(
            create_block_mask(
                flex_mask_mod(place_RS, window), rows, None, length, length, device=str(device), _compile=compiled
            )
        )

    def attend(self, query, key, value, scaling):
        attended = _compiled_flex_attention()(
            query, key, value, block_mask=self.block_mask, scale=scaling, enable_gqa=True
        )
        return attended.transpose(1, 2)

    def at(self, chosen_N, shape):
        return Scattered(self, chosen_N, shape)


@dataclasses.dataclass(frozen=True)
class Scattered:
    """A few queries with a plan for all positions: they are scattered into a tensor of zeros at their positions, and
    the result is gathered from it. This saves nothing in attention itself, but everything after it. It suits
    flex_attention, where attention is cheap and every new shape is compiled."""

    plan: AttentionPlan
    chosen_N: torch.Tensor
    shape: tuple[int, int]

    def attend(self, query, key, value, scaling):
        rows, length = self.shape
        chosen = query[0].transpose(0, 1)
        everywhere = chosen.new_zeros(rows * length, *chosen.shape[1:]).index_copy(0, self.chosen_N, chosen)
        attended = self.plan.attend(everywhere.unflatten(0, self.shape).transpose(1, 2), key, value, scaling)
        return attended.flatten(0, 1).index_select(0, self.chosen_N)[None]


_compiled = None


def _compiled_flex_attention():
    """flex_attention, compiled on first use, so that this module imports on a machine without a compiler."""
    global _compiled
    if _compiled is None:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled = torch.compile(flex_attention, dynamic=True)
    return _compiled


def attention_function(
    module, query, key, value, attention_mask, scaling, visibility=None, sliding_window: int | None = None, **kwargs
):
    """The attention function that transformers' modules call."""
    if visibility is None:
        raise TypeError("this model uses the visibility rule: call it through dfactory's Policy, which makes the plan")
    plan = visibility.within(sliding_window) if isinstance(visibility, PlanByLayer) else visibility
    return plan.attend(query, key, value, scaling), None


def register() -> None:
    AttentionInterface.register(ATTENTION, attention_function)
