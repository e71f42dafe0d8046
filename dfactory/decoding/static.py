"""Denoising forwards of few fixed shapes, which a GPU replays as CUDA graphs.

A forward over a few blocks is some thousand small kernels, and starting them from Python takes longer than running them.
Here all slots take part in every forward, each with one or two blocks, so that the shapes repeat and the kernels of a
shape are recorded once. Where a slot has no second block, or no response, tokens stand in whose results nobody reads:

    slot 0   [ clean b | masked b+1 ]
    slot 1   [ masked b | ......... ]     the stand-ins write where the next block's own pass will write before it is seen
    slot 2   [ ........ | ......... ]     a free slot: whoever takes it writes first

How many keys a forward reads is rounded up to a power of two, so that there are a few recordings, not one a block.

Letters: R slots, S tokens of a slot in a forward, K keys of a slot; N = R x S; B block size; d size of a head.
"""

import dataclasses

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from dfactory.decoding.cache import BlockCache, Span, seen_blocks
from dfactory.decoding.response import Response
from dfactory.errors import ConfigError
from dfactory.types import EmbeddingInputs

FEWEST_KEYS = 8  # blocks


@dataclasses.dataclass(frozen=True)
class StaticAttention:
    """Every token attends to the beginning of its slot."""

    mask_RSK: torch.Tensor

    def attend(self, query, key, value, scaling):
        """query [1, heads, N, d], key and value [slots, kv heads, capacity, d] -> [1, N, heads, d]."""
        slots, width, keys = self.mask_RSK.shape
        heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
        # Heads that share a key head are concatenated as further queries, so that keys are not copied.
        query = query[0].view(kv_heads, -1, slots, width, size).permute(2, 0, 1, 3, 4).flatten(2, 3)
        mask = self.mask_RSK[:, None].repeat(1, 1, heads // kv_heads, 1)
        attended = scaled_dot_product_attention(
            query, key[:, :, :keys], value[:, :, :keys], attn_mask=mask, scale=scaling
        )
        return attended.view(slots, heads, width, -1).transpose(1, 2).flatten(0, 1)[None]

    def at(self, chosen_N: torch.Tensor, shape: tuple[int, int]) -> "StaticAttention":
        """The plan for the queries of some tokens of each slot, as many of one as of another."""
        slots = len(self.mask_RSK)
        return StaticAttention(self.mask_RSK.flatten(0, 1).index_select(0, chosen_N).unflatten(0, (slots, -1)))


class Recording:
    """The forward of one shape. The first call runs and records it, later ones replay it."""

    def __init__(self, policy, cache: BlockCache, block_size: int, width: int, keys: int):
        self.policy, self.cache, self.keys = policy, cache, keys
        self.inputs_3RS = torch.zeros(3, cache.slots, width, dtype=torch.long, device=policy.device)
        self.slot_N = torch.arange(cache.slots, device=policy.device).repeat_interleave(width)
        self.key_K = torch.arange(keys, device=policy.device)
        self.chosen_N = torch.zeros(cache.slots * block_size, dtype=torch.long, device=policy.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs_3RS: np.ndarray, chosen_N: np.ndarray) -> torch.Tensor:
        """Ids, positions and numbers of keys that are seen; a block's tokens of each slot -> their hidden states
        [slots x B, H], good until the next call."""
        self.inputs_3RS.copy_(torch.from_numpy(inputs_3RS))
        self.chosen_N.copy_(torch.from_numpy(chosen_N))
        if self.policy.device.type != "cuda":
            return self._forward()
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.hidden_NH

    def _forward(self) -> torch.Tensor:
        ids_RS, position_RS, seen_RS = self.inputs_3RS
        self.cache.expect(self.slot_N, position_RS.flatten())
        plan = StaticAttention(self.key_K < seen_RS[:, :, None])
        inputs_1N = EmbeddingInputs(ids_RS.reshape(1, -1), noise=None)
        return self.policy.hidden_at(self.chosen_N, inputs_1N, position_RS.reshape(1, -1), plan, self.cache)

    def _record(self) -> None:
        # torch requires a warm-up on another stream first, in which libraries allocate their memory.
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self._forward()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden_NH = self._forward()


class StaticForward:
    """Forwards over the slots of a cache, which has room for one block more than its longest document."""

    def __init__(self, policy, cache: BlockCache, block_size: int):
        if policy.device.type == "cuda" and not policy.can_be_recorded:
            raise ConfigError(
                "cuda_graphs with a model in float32, or one whose forwards need other ranks: load it in bfloat16, or set "
                "decode.cuda_graphs to false"
            )
        self.policy, self.cache, self.block_size = policy, cache, block_size
        self.recordings: dict[tuple[int, int], Recording] = {}

    def __call__(self, responses: list[Response], spans: list[Span], open_RB: np.ndarray) -> torch.Tensor:
        """Hidden states of the open positions of each span's last block, span by span."""
        size = self.block_size
        width = size * max(span.blocks for span in spans)
        keys = self._rounded(size * max(span.stop for span in spans))
        inputs_3RS = np.zeros((3, self.cache.slots, width), dtype=np.int64)
        ids_RS, position_RS, seen_RS = inputs_3RS
        position_RS += np.arange(width)
        seen_RS += 1  # a token that saw nothing would be divided by nothing
        blocks_RQ = seen_blocks(spans)
        for response, span, blocks_Q in zip(responses, spans, blocks_RQ, strict=True):
            tokens = span.blocks * size
            start = span.origin + span.first * size
            ids_RS[span.slot, :tokens] = response.embedding_inputs(slice(start, start + tokens)).token
            position_RS[span.slot] += start
            seen_Q = np.minimum(blocks_Q[: span.blocks] * size + span.origin, response.stop)
            seen_RS[span.slot, :tokens] = np.repeat(seen_Q, size)
        if (width, keys) not in self.recordings:
            self.recordings[width, keys] = Recording(self.policy, self.cache, size, width, keys)
        hidden_NH = self.recordings[width, keys](inputs_3RS, self._last_blocks(spans, width))
        # With shifted logits a position is predicted from the left. The first one of a block is never open then.
        index_RB = np.array([[span.slot] for span in spans]) * size + np.arange(size) - self.policy.logit_shift
        return hidden_NH[torch.from_numpy(index_RB[open_RB]).to(hidden_NH.device)]

    def _last_blocks(self, spans: list[Span], width: int) -> np.ndarray:
        """Which tokens of the forward are the last block of each slot's span; any block of a free slot."""
        first_R = np.arange(self.cache.slots) * width
        for span in spans:
            first_R[span.slot] += (span.blocks - 1) * self.block_size
        return (first_R[:, None] + np.arange(self.block_size)).flatten()

    def _rounded(self, keys: int) -> int:
        rounded = self.block_size * FEWEST_KEYS
        while rounded < keys:
            rounded *= 2
        return min(rounded, self.cache.capacity)
