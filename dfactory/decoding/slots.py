"""Slots in which responses are decoded together: who is in which, and what a forward makes of them.

Responses join and leave between forwards, each with rules of its own apart from the block size. How a forward runs differs
between models: block by block over a cache (decoder.py), or over whole canvases (canvas.py).

Letters: R responses in slots, B block size, N open positions, H hidden.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from dfactory.decoding.deciding import decide
from dfactory.decoding.decisions import DecodeRules
from dfactory.decoding.response import Outcome, Response, document_length
from dfactory.errors import ConfigError
from dfactory.types import EmbeddingInputs, Place, Rollout

LAYOUT = ("block_size", "max_new_tokens", "blocks_from_prompt")  # rules that a document is laid out by


class Decodable(Protocol):
    """What the decoder needs of a policy."""

    device: torch.device
    config: Any  # with `vocab_size`
    logit_shift: int  # 1: the hidden state at i - 1 predicts the token at i
    can_be_recorded: bool  # whether forwards of fixed shape may be replayed as CUDA graphs
    compile_problem: str | None  # what keeps its forwards from being compiled, and the remedy
    sees_whole_document: (
        bool | None
    )  # whether attention is full: decoded on a canvas, without a cache; None: either way

    def hidden_at(
        self, chosen_N, inputs_RS: EmbeddingInputs, position_ids_RS, visibility, cache=None
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...

    # Of a policy that may see whole documents:

    def plan(self, place_RS: Place): ...

    def predicting(self, index_N: torch.Tensor, position_ids_RS: torch.Tensor) -> torch.Tensor: ...


class Progress(NamedTuple):
    """What a callback gets after every forward, once for each response that took part."""

    prompt: int  # index into prompt_ids, or what the response was added as
    forwards: int
    token_ids: list[int]  # the response to the end of the block that the forward ran over, masks included
    draft_ids: list[int]  # the same with what the forward proposed in place of the masks that are left
    draft_logprobs: list[float]  # of these proposals; 0 where there is no mask
    settled: int  # how many of these tokens stand in finished blocks and stay as they are
    rollout: Rollout | None  # when this forward finished it
    logprobs: Sequence[
        float
    ] = ()  # of token_ids, each at the forward that wrote it; 0 of a mask, or of what a draft gave


class _Proposed(NamedTuple):
    """What a forward proposed in place of the masks of a block that are left."""

    here: slice
    left_B: np.ndarray
    outcome: Outcome


class Slots:
    """`slots` responses of up to `capacity` tokens each, prompt included, decoded together; see `document_length`. What
    inherits from it says how a forward runs."""

    canvas: bool  # whether its responses lie on a canvas, each seen as a whole
    has_leads = False  # whether the first token of a block comes before its first denoising forward, see response.py

    def __init__(self, policy: Decodable, block_size: int, slots: int, capacity: int):
        self.policy, self.block_size, self.capacity = policy, block_size, capacity
        self.free = list(reversed(range(slots)))
        self.live: list[Response] = []

    def add(
        self, index: int, prompt: Sequence[int], rules: DecodeRules, *, draft: Sequence[int] = (), noise_id: int = 0
    ) -> Rollout | None:
        """Take a checked prompt into a free slot, under a number that no live response has. Returns the rollout where
        the draft leaves nothing to do. Raises ConfigError for what this decoder has no room for."""
        length = document_length(len(prompt), rules)
        if rules.block_size != self.block_size:
            raise ConfigError(f"block_size {rules.block_size}: this decoder has blocks of {self.block_size}")
        if rules.canvas != self.canvas:
            seen = "whole documents" if self.canvas else "clean blocks"
            raise ConfigError(
                f"DecodeRules.canvas {rules.canvas}, but the model sees {seen}: make the rules with its Vocabulary, or with "
                f"canvas={self.canvas}"
            )
        if length > self.capacity:
            raise ConfigError(
                f"prompt of {len(prompt)} tokens with max_new_tokens {rules.max_new_tokens} takes {length} positions, a "
                f"slot has {self.capacity}: shorten the prompt or lower max_new_tokens"
            )
        response = Response(index, prompt, draft, noise_id, self.free.pop(), rules, self.has_leads)
        if response.is_complete:
            self.free.append(response.slot)
            return response.rollout()
        self.live.append(response)
        return None

    def remove(self, index: int) -> None:
        """Give up a live response; its slot is free at once."""
        self._let_go(self._find(index))

    def change_rules(self, index: int, rules: DecodeRules) -> None:
        """Decode on by other rules. What the document was laid out by, block size and max_new_tokens, has to stay."""
        response = self._find(index)
        if any(getattr(rules, name) != getattr(response.rules, name) for name in LAYOUT):
            raise ConfigError(f"{', '.join(LAYOUT)} cannot change while a response is being decoded")
        response.change_rules(rules)

    def _find(self, index: int) -> Response:
        return next(response for response in self.live if response.index == index)

    @torch.no_grad()  # not inference_mode: a policy in training goes on with what its modules keep (ZeRO-3's parameters)
    def step(self) -> list[Progress]:
        """One denoising forward of every live response, after what it needs; none for none. Comes with the responses that
        were finished before it."""
        finished = self._prepare()
        return finished + (self._step() if self.live else [])

    def _prepare(self) -> list[Progress]:
        """Compute what has to be there before the next denoising forward. Returns what that finished."""
        return []

    def _denoise(self, open_RB: np.ndarray) -> torch.Tensor:
        """Hidden states [N, H] that predict the open positions of the live responses' blocks, row by row."""
        raise NotImplementedError

    def _step(self) -> list[Progress]:
        open_RB = np.stack([response.open_B for response in self.live])
        hidden_NH = self._denoise(open_RB)
        return [self._apply(*decided) for decided in decide(self.policy, self.live, hidden_NH, open_RB)]

    def _apply(self, response: Response, outcome: Outcome) -> Progress:
        """Write what a forward decided about a response, which leaves its slot where that finishes it."""
        here, stop, open_B = response.here, response.decoded.stop, response.open_B
        goes_on = response.apply(outcome)
        proposed = _Proposed(here, open_B & (response.tokens_T[here] == response.rules.mask_token_id), outcome)
        heard = self._progress(response, stop, proposed, goes_on)
        if not goes_on:
            self._let_go(response)
        return heard

    def _let_go(self, response: Response) -> None:
        self.live.remove(response)
        self.free.append(response.slot)

    def _progress(self, response: Response, stop: int, proposed: _Proposed | None, goes_on: bool) -> Progress:
        """`stop`: the end of the block that the forward ran over, or of the document."""
        token_T = response.tokens_T[:stop]
        draft_T, draft_logprob_T = response.tokens_T.copy(), np.zeros(len(response.tokens_T))
        if proposed is not None:
            here, left_B, outcome = proposed
            draft_T[here][left_B] = outcome.token_B[left_B]
            draft_logprob_T[here][left_B] = outcome.logprob_B[left_B]
        return Progress(
            response.index,
            response.forwards,
            token_T[response.start :].tolist(),
            draft_T[response.start : stop].tolist(),
            draft_logprob_T[response.start : stop].tolist(),
            max(response.here.start if goes_on else stop, response.start) - response.start,
            None if goes_on else response.rollout(),
            response.logprob_T[response.start : stop].tolist(),
        )
