"""Decoding of models with causal context and uniform noise: canvases from left to right, over a cache of clean tokens.

    prompt p p p | canvas 1: r r r r                 forward 1 runs over p p p and r r r r, whose keys go to the cache
    prompt p p p | a b c d | canvas 2: r r r r       the first forward of canvas 2 runs over a b c d, clean now

A canvas starts from random tokens (r). Each forward predicts all of it; the rule (rules/renoise.py) says which predictions
stand in the next canvas, the others are random again, and the prediction's expected embedding goes into the next forward
(self-conditioning). The canvas becomes its most probable tokens at its last forward. So a rollout records that forward as
the commit step of all of them, with the log-probabilities that they had there: what stood on the canvas before is noise.

Random tokens are a pure function of (rules.seed, the prompt's noise id, how many canvases the response drew before).

Letters: R responses, B tokens of a canvas, N tokens of a forward, V vocabulary, H hidden, K forwards; d size of a head.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from dfactory.decoding.cache import BlockCache
from dfactory.decoding.deciding import LOGITS_BYTES
from dfactory.decoding.decisions import DecodeRules
from dfactory.decoding.distribution import draw
from dfactory.decoding.response import Outcome, Response
from dfactory.decoding.slots import Decodable, Progress, Slots
from dfactory.errors import ConfigError
from dfactory.types import EmbeddingInputs, Place, Rollout
from dfactory.visibility import visible

CLEAN_TOKENS = 4096  # of a response, that one forward takes; bounds a prefill's memory


class Stretch(NamedTuple):
    """What a forward runs over of one response: clean tokens that are not in the cache yet, then its canvas or nothing."""

    response: Response
    first: int  # position of the first clean token
    start: int  # one past the last; where the canvas begins
    canvas: int  # its length; 0: none

    @property
    def stop(self) -> int:
        return self.start + self.canvas


class Predicted(NamedTuple):
    """What a forward says of some positions of a canvas; fields [n] but the last, [n, H]."""

    top: torch.Tensor  # the most probable token
    logprob: torch.Tensor  # its log-probability
    entropy: torch.Tensor
    drawn: torch.Tensor  # the token that may stand in the next canvas
    mean: torch.Tensor  # the expected embedding


@dataclasses.dataclass(frozen=True)
class StretchAttention:
    """Every stretch attends to its own slot: clean tokens under a mask, the canvas to all that it sees."""

    parts: list[tuple[int, slice, slice, torch.Tensor | None]]  # slot, queries in the row, keys of the slot, mask

    @classmethod
    def of(cls, stretches: Sequence[Stretch], window: int | None, device: torch.device) -> "StretchAttention":
        parts, at = [], 0
        for slot, first, start, canvas in ((s.response.slot, *s[1:]) for s in stretches):
            for begin, stop, view in ((first, start, 0), (start, start + canvas, 1)):
                if stop > begin:
                    seen = _seen(begin, stop, view, window)
                    low, high = np.flatnonzero(seen.any(axis=0))[[0, -1]].tolist()
                    mask = seen[:, low : high + 1]
                    mask = None if mask.all() else torch.from_numpy(mask).to(device)
                    parts.append((slot, slice(at, at + stop - begin), slice(low, high + 1), mask))
                    at += stop - begin
        return cls(parts)

    def attend(self, query, key, value, scaling):
        """query [1, heads, N, d], key and value [slots, kv heads, capacity, d] -> [1, N, heads, d]."""
        attended = []
        for slot, tokens, keys, mask in self.parts:
            k, v = key[slot : slot + 1, :, keys], value[slot : slot + 1, :, keys]
            q = query[:, :, tokens]
            attended.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True))
        return torch.cat(attended, dim=2).transpose(1, 2)


def _seen(begin: int, stop: int, view: int, window: int | None) -> np.ndarray:
    """bool [queries, keys]: what the tokens from `begin` to `stop` see of the positions before `stop` of their slot.
    Everything before them is clean."""
    position, key = np.arange(begin, stop)[:, None], np.arange(stop)[None]
    key_view = np.where(key >= begin, view, 0)
    block = np.full_like(position, begin) if view else position
    key_block = np.where((key >= begin) & (view > 0), begin, key)
    nought, key_nought = np.zeros_like(position), np.zeros_like(key)
    query = Place(nought, nought + view, block, nought)
    return visible(query, Place(key_nought, key_view, key_block, key_nought), window)


class RenoisingDecoder(Slots):
    """Responses of models with causal context and uniform noise."""

    canvas = True

    def __init__(self, policy: Decodable, block_size: int, slots: int, capacity: int):
        super().__init__(policy, block_size, slots, capacity)
        self.cache = BlockCache(slots, capacity)
        self.cached: dict[int, int] = {}  # by response: clean tokens in the cache

    def add(
        self, index: int, prompt: Sequence[int], rules: DecodeRules, *, draft: Sequence[int] = (), noise_id: int = 0
    ) -> Rollout | None:
        if len(draft):
            raise ConfigError("a draft with uniform noise: a canvas has no masks beside it; decode without a draft")
        self.cached[index] = 0
        return super().add(index, prompt, rules, draft=draft, noise_id=noise_id)

    def random_canvas(self, response: Response, number: int) -> np.ndarray:
        """int64 [B]: random tokens of a response; the first have number 1."""
        stream = np.random.Philox(key=[response.rules.seed, response.noise_id], counter=[0, 0, 1, number])
        return np.random.Generator(stream).integers(0, self.policy.config.vocab_size, self.block_size)

    def _prepare(self) -> list[Progress]:
        """Random canvases for those who begin one, and all but the last clean tokens of long prompts."""
        for response in self.live:
            if "canvas" not in response.memory:
                history = torch.full((response.rules.rule.stable_forwards, self.block_size), -1)
                response.memory = {"canvas": self._random(response, 0), "history": history}
            while response.here.start - self.cached[response.index] > CLEAN_TOKENS:
                first = self.cached[response.index]
                self._forward([Stretch(response, first, first + CLEAN_TOKENS, 0)])
        return []

    def _step(self) -> list[Progress]:
        stretches = [Stretch(r, self.cached[r.index], r.here.start, self.block_size) for r in self.live]
        hidden_RBH = self._forward(stretches).unflatten(0, (len(stretches), self.block_size))
        both = zip(list(self.live), hidden_RBH, strict=True)
        return [self._apply(r, self._decide(r, self._predict(r, hidden_BH))) for r, hidden_BH in both]

    def _forward(self, stretches: Sequence[Stretch]) -> torch.Tensor:
        """Hidden states [R x B, H] of the canvases, after a forward over these stretches whose keys go to the cache."""
        device = self.policy.device
        lengths = np.array([s.stop - s.first for s in stretches])
        position_N = np.concatenate([np.arange(s.first, s.stop) for s in stretches])
        noised_N = np.concatenate([np.arange(s.first, s.stop) >= s.start for s in stretches])
        slot_N = np.repeat([s.response.slot for s in stretches], lengths)
        ids_N = np.concatenate([self._ids(s) for s in stretches])
        ids_N, position_N, slot_N = torch.from_numpy(np.stack([ids_N, position_N, slot_N])).to(device)
        chosen_N, noised_N = (
            torch.from_numpy(np.flatnonzero(noised_N)).to(device),
            torch.from_numpy(noised_N).to(device),
        )
        self.cache.expect(slot_N, position_N)
        plan = self.policy.plan_by_layer(noised_N[None], lambda window: StretchAttention.of(stretches, window, device))
        inputs = EmbeddingInputs(ids_N[None], noise=None)
        conditioned = self._conditioning(stretches, chosen_N, len(ids_N))
        hidden = self.policy.hidden_at(chosen_N, inputs, position_N[None], plan, self.cache, **conditioned)
        for stretch in stretches:
            self.cached[stretch.response.index] = stretch.start
        return hidden

    def _ids(self, stretch: Stretch) -> np.ndarray:
        clean = stretch.response.tokens_T[stretch.first : stretch.start]
        return np.concatenate([clean, stretch.response.memory["canvas"].numpy()]) if stretch.canvas else clean

    def _conditioning(self, stretches: Sequence[Stretch], chosen_N, length: int) -> dict[str, torch.Tensor]:
        """The expected embeddings by each canvas's last forward, 0 at its first; nothing where all are at their first."""
        means = [s.response.memory.get("mean") for s in stretches if s.canvas]
        like = next((mean for mean in means if mean is not None), None)
        if like is None:
            return {}
        mean_NH = torch.cat([torch.zeros_like(like) if mean is None else mean for mean in means])
        return {"conditioning_RSH": mean_NH.new_zeros(length, mean_NH.shape[-1]).index_copy(0, chosen_N, mean_NH)[None]}

    def _predict(self, response: Response, hidden_BH: torch.Tensor) -> Predicted:
        rules, step = response.rules, response.mask_steps
        scaled = dataclasses.replace(rules.distribution, temperature=rules.rule.temperature(step))
        uniform_B = None
        if not rules.distribution.is_greedy:
            uniform_B = torch.from_numpy(response.uniform_B()).to(hidden_BH.device)
        rows = max(1, LOGITS_BYTES // (4 * self.policy.config.vocab_size))
        parts = []
        for start in range(0, self.block_size, rows):
            part = slice(start, start + rows)
            logits_nV = scaled.processed(self.policy.logits(hidden_BH[part]))
            logprob_nV = logits_nV.log_softmax(dim=-1)
            logprob_n, top_n = logprob_nV.max(dim=-1)
            drawn_n = top_n
            if uniform_B is not None:
                drawn_n = draw((logprob_nV / rules.distribution.temperature).log_softmax(dim=-1), uniform_B[part])
            entropy_n = torch.special.entr(logprob_nV.exp()).sum(dim=-1)
            parts.append(Predicted(top_n, logprob_n, entropy_n, drawn_n, self.policy.expected_embedding(logits_nV)))
        return Predicted(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _decide(self, response: Response, predicted: Predicted) -> Outcome:
        """The whole canvas where it ends, else the next one."""
        rule, memory = response.rules.rule, response.memory
        top_B, logprob_B, entropy_B, drawn_B = (field.cpu() for field in predicted[:4])
        last = response.mask_steps >= rule.denoising_steps - 1
        ends = last or bool(rule.ends(top_B[None], memory["history"][None], entropy_B[None]))
        nowhere_B = np.zeros(self.block_size, bool)
        commit_B = ~nowhere_B if ends else nowhere_B
        memory = {} if ends else self._next(response, rule.kept(entropy_B[None])[0], drawn_B, top_B, predicted.mean)
        return Outcome(top_B.numpy(), logprob_B.double().numpy(), commit_B, nowhere_B, nowhere_B, memory)

    def _next(self, response: Response, kept_B, drawn_B, top_B, mean_BH) -> dict[str, torch.Tensor]:
        """What the next forward of the canvas starts from."""
        history = torch.cat([response.memory["history"], top_B[None]])[1:]
        return {"canvas": torch.where(kept_B, drawn_B, self._random(response, 1)), "mean": mean_BH, "history": history}

    def _random(self, response: Response, forwards: int) -> torch.Tensor:
        """The next random tokens, after so many forwards more: each canvas draws some at first, and some after a forward."""
        return torch.from_numpy(
            self.random_canvas(response, response.forwards + forwards + len(response.block_forwards))
        )
