"""The block K/V cache and the attention over it (docs/method.md#cache).

A slot holds the keys and values of one document, each at its own position. A forward runs over a *span* of every slot:
the clean blocks that are not in the cache yet, then the block that is being denoised.

    slot 0   [ cached ............ | clean b | masked b+1 ]     a finished block is written by the next one's first pass
    slot 1   [ cached .. | masked b ]                           a later pass of its block
    slot 2   [ clean 0 | clean 1 | clean 2 | masked 3 ]         a prompt that has just come in

All spans are concatenated in a single sequence, so ragged slots cost nothing outside attention. Every pass writes the
keys of its whole span. Those of a masked block are overwritten by the block's next pass, and at last by one over its
clean tokens; as that one sees clean tokens only, its keys are exact and never need a refresh.

With a sub-block cache a forward may run over a part of the block alone, and sees the other keys of the block as they were
when a forward last ran over all of it.

Letters: N tokens of a forward, R spans, Q blocks of a span, K blocks of a slot, B block size; d size of a head.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache

from dfactory.types import PADDING, Place
from dfactory.visibility import visible

TOGETHER = 64  # tokens of small blocks in one attention call on a CPU


class Span(NamedTuple):
    """Neighbouring blocks of one slot, which a forward runs over."""

    slot: int
    first: int  # block, counted from the start of the document
    stop: int  # one past the last block
    denoises: bool  # the last block is being denoised; all others are clean
    origin: int = 0  # the position from which blocks are counted; below 0 the first block is short
    end: int | None = None  # the end of the document, where that cuts the last block short
    within: slice | None = None  # positions: the only ones that the forward runs over; None: all of the blocks

    @property
    def blocks(self) -> int:
        return self.stop - self.first

    def positions(self, block_size: int) -> slice:
        """What the forward runs over."""
        if self.within is not None:
            return self.within
        start, stop = (self.origin + block * block_size for block in (self.first, self.stop))
        return slice(max(start, 0), stop if self.end is None else min(stop, self.end))


class BlockCache(Cache):
    """Keys and values of `slots` documents of up to `capacity` tokens; a transformers Cache that is never cropped.

    Per layer two tensors [slots, kv heads, capacity, d], made when the layer is first reached.
    """

    def __init__(self, slots: int, capacity: int):
        super().__init__(layers=[])
        self.slots, self.capacity = slots, capacity
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._slot_N = self._position_N = None

    def expect(self, slot_N: torch.Tensor, position_N: torch.Tensor) -> None:
        """Say where the tokens of the coming forward belong."""
        self._slot_N, self._position_N = slot_N, position_N

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Write keys and values [1, kv heads, N, d] of a layer to their slots; return those of all slots, uncropped."""
        if layer_idx == len(self.keys):
            for stored, states in ((self.keys, key_states), (self.values, value_states)):
                _, heads, _, width = states.shape  # which may differ between keys and values
                stored.append(states.new_zeros((self.slots, heads, self.capacity, width)))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._slot_N, :, self._position_N] = key_states[0].transpose(0, 1)
        values[self._slot_N, :, self._position_N] = value_states[0].transpose(0, 1)
        return keys, values

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Give slot `target` the first `tokens` keys and values of slot `source`."""
        for stored in (*self.keys, *self.values):
            stored[target, :, :tokens] = stored[source, :, :tokens]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers asks this to number positions that it is not given; ours always are."""
        return 0


def span_places(spans: list[Span]) -> tuple[Place, Place]:
    """The places of the spans' blocks [R, Q], and of all blocks of their slots [R, K], numpy, with padding."""
    slot_R, first_R, stop_R, denoises_R = np.array([span[:4] for span in spans], dtype=np.int64).T
    denoised_R = np.where(denoises_R == 1, stop_R - 1, -1)

    def places(block_RX):
        document_RX = np.where(block_RX < stop_R[:, None], slot_R[:, None], PADDING)
        view_RX = (block_RX == denoised_R[:, None]).astype(np.int64)
        return Place(document_RX, view_RX, block_RX, trunk=document_RX)

    queries = first_R[:, None] + np.arange((stop_R - first_R).max())
    keys = np.arange(stop_R.max())[None].repeat(len(spans), axis=0)
    return places(queries), places(keys)


def seen_blocks(spans: list[Span]) -> np.ndarray:
    """How many blocks each block of the spans sees, [R, Q]; they are the first ones of its slot."""
    query_RQ, key_RK = span_places(spans)
    seen_RQK = visible(Place(*(f[:, :, None] for f in query_RQ)), Place(*(f[:, None, :] for f in key_RK)))
    return seen_RQK.sum(axis=-1)


@functools.lru_cache(maxsize=256)
def _seen_by_blocks(first: int, stop: int, denoises: bool) -> np.ndarray:
    """`seen_blocks` of one span in any slot, [Q]. The forwards of a block ask for the same."""
    (seen_Q,) = seen_blocks([Span(0, first, stop, denoises)])
    seen_Q.flags.writeable = False
    return seen_Q


def seen_keys(spans: list[Span], block_size: int) -> Iterator[np.ndarray]:
    """How many keys of its slot each token of a span sees; they are the first ones. An array for each span."""
    for span in spans:
        seen_Q = _seen_by_blocks(span.first, span.stop, span.denoises)
        here = span.positions(block_size)
        block_T = (np.arange(here.start, here.stop) - span.origin) // block_size - span.first
        keys_T = seen_Q[block_T] * block_size + span.origin
        yield keys_T if span.end is None else np.minimum(keys_T, span.end)


class Part(NamedTuple):
    """Consecutive tokens of one slot, which attend to its first keys."""

    slot: int
    tokens: slice  # of the row
    keys: int
    mask: torch.Tensor | None  # bool [tokens, keys]; None: each sees all


@dataclasses.dataclass(frozen=True)
class BlockwiseAttention:
    """A call for every block, without a mask or a copy, and a masked one for small blocks together; where calls are cheap
    (CPU)."""

    parts: list[Part]

    @classmethod
    def of(cls, spans: list[Span], block_size: int, device: torch.device) -> "BlockwiseAttention":
        parts, start = [], 0
        for span, keys_T in zip(spans, seen_keys(spans, block_size), strict=True):
            for seen_T in _together(keys_T):
                stop, most = start + len(seen_T), int(seen_T[-1])
                alike = seen_T[0] == most
                mask = None if alike else torch.from_numpy(np.arange(most) < seen_T[:, None]).to(device)
                parts.append(Part(span.slot, slice(start, stop), most, mask))
                start = stop
        return cls(parts)

    def attend(self, query, key, value, scaling):
        """query [1, heads, N, d], key and value [slots, kv heads, capacity, d] -> [1, N, heads, d]."""
        found = []
        for slot, tokens, keys, mask in self.parts:
            k, v = key[slot : slot + 1, :, :keys], value[slot : slot + 1, :, :keys]
            found.append(
                scaled_dot_product_attention(query[:, :, tokens], k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
            )
        return torch.cat(found, dim=2).transpose(1, 2)

    def at(self, chosen_N: torch.Tensor, shape: tuple[int, int]) -> "BlockwiseAttention":
        """The plan for the queries of some tokens of the row, which ascend."""
        ends = np.searchsorted(chosen_N.numpy(), [0, *(part.tokens.stop for part in self.parts)]).tolist()
        left = []
        for part, (a, b) in zip(self.parts, itertools.pairwise(ends), strict=True):
            if a < b:
                mask = None if part.mask is None else part.mask[chosen_N[a:b] - part.tokens.start]
                left.append(part._replace(tokens=slice(a, b), mask=mask))
        return BlockwiseAttention(left)


def _together(keys_T: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of seen keys of a span's tokens, which ascend, in parts of whole blocks: as many as hold TOGETHER tokens,
    at least one."""
    if keys_T[0] == keys_T[-1]:  # one block, as in most forwards
        yield keys_T
        return
    ends = np.flatnonzero(np.diff(keys_T, append=-1)) + 1  # of blocks
    start = 0
    while start < len(keys_T):
        fitting = ends[(ends > start) & (ends <= start + TOGETHER)]
        stop = int(fitting[-1]) if len(fitting) else int(ends[ends > start][0])
        yield keys_T[start:stop]
        start = stop


@dataclasses.dataclass(frozen=True)
class PaddedAttention:
    """One masked call for all slots, padded to the longest span and the longest slot; for GPUs, where calls are
    expensive."""

    slot_R: torch.Tensor
    place_N: torch.Tensor  # the position of each query in the flattened [R, S]
    mask_R1SS: torch.Tensor  # query, key

    @classmethod
    def of(cls, spans: list[Span], block_size: int, device: torch.device) -> "PaddedAttention":
        keys_R = list(seen_keys(spans, block_size))
        seen_RS = np.zeros((len(spans), max(map(len, keys_R))), dtype=np.int64)  # 0: nothing, where a span has ended
        for seen_S, keys_T in zip(seen_RS, keys_R, strict=True):
            seen_S[: len(keys_T)] = keys_T
        mask_RSS = np.arange(seen_RS.max()) < seen_RS[:, :, None]
        slots = [span.slot for span in spans]
        return cls(
            torch.tensor(slots, device=device),
            torch.from_numpy(np.flatnonzero(seen_RS > 0)).to(device),
            torch.from_numpy(mask_RSS[:, None]).to(device),
        )

    def attend(self, query, key, value, scaling):
        """query [1, heads, N, d], key and value [slots, kv heads, capacity, d] -> [1, N, heads, d]."""
        rows, _, width, longest = self.mask_R1SS.shape
        key, value = (stored[:, :, :longest].index_select(0, self.slot_R) for stored in (key, value))
        row_NHd = query[0].transpose(0, 1)
        padded = row_NHd.new_zeros(rows * width, *row_NHd.shape[1:]).index_copy(0, self.place_N, row_NHd)
        query = padded.unflatten(0, (rows, width)).transpose(1, 2)
        attended_RHSd = scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask_R1SS, scale=scaling, enable_gqa=True
        )
        return attended_RHSd.transpose(1, 2).flatten(0, 1)[self.place_N][None]

    def at(self, chosen_N: torch.Tensor, shape: tuple[int, int]) -> "PaddedAttention":
        """The plan for the queries of some tokens of the row."""
        return dataclasses.replace(self, place_N=self.place_N[chosen_N])


def attend_spans(spans: list[Span], block_size: int, device: torch.device):
    """The attention plan of a forward over `spans`."""
    form = PaddedAttention if device.type == "cuda" else BlockwiseAttention
    return form.of(spans, block_size, device)
