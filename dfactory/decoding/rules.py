"""What to commit and what to edit: the decoding rules of METHOD section 9, as arithmetic on tensors without a model.

A forward gives the open positions of a block their logits; the rules turn them into a decision:

    logits --Distribution--> Proposal --Threshold--> which masks become tokens
                                      --Editing----> which tokens become other tokens

Confidence, sample and recorded log-probability come from one distribution, the processed one: special tokens suppressed,
then temperature, top-k and top-p. At temperature 0 the token is the most probable one and the distribution is the
plain softmax, without top-k and top-p.

Letters: N scored positions, R responses that are decoded together, B block size, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dfactory.config.decode import DecodeKeys
from dfactory.errors import ConfigError


class Proposal(NamedTuple):
    """What the model would put at each position; tensors of one shape.

    vocabulary (a b c) with p = (0.5 0.3 0.2), b drawn:  token b   logprob ln 0.3   top_logprob ln 0.5
    """

    token: torch.Tensor  # int64
    logprob: torch.Tensor  # float32, of `token` under the processed distribution
    top_logprob: torch.Tensor  # float32, of the most probable token

    def confidence(self, acceptance: str) -> torch.Tensor:
        """The probability that a threshold is compared with: of `token` (`sampled`) or of the top token (`top`)."""
        return (self.logprob if acceptance == "sampled" else self.top_logprob).exp()


@dataclasses.dataclass(frozen=True)
class Distribution:
    """From logits to the distribution that tokens are drawn from."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    suppressed_ids: tuple[int, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def propose(self, logits_NV: torch.Tensor, uniform_N: torch.Tensor | None = None) -> Proposal:
        """Draw a token for every position. `uniform_N`: float64 in [0, 1), not needed when greedy."""
        logits_NV = self._processed(logits_NV)
        if self.is_greedy:
            top_N, token_N = logits_NV.max(dim=-1)
            logprob_N = top_N - logits_NV.logsumexp(dim=-1)
            return Proposal(token_N, logprob_N, logprob_N)
        logprob_NV = logits_NV.log_softmax(dim=-1)
        token_N = _draw(logprob_NV, uniform_N)
        return Proposal(token_N, logprob_NV.gather(-1, token_N[:, None])[:, 0], logprob_NV.amax(dim=-1))

    def _processed(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """float32 logits of the processed distribution: -inf where a token cannot come out."""
        logits_NV = logits_NV.float()
        if self.suppressed_ids:
            ids = torch.tensor(self.suppressed_ids, device=logits_NV.device)
            logits_NV = logits_NV.index_fill(-1, ids, -math.inf)
        if self.is_greedy:
            return logits_NV
        logits_NV = logits_NV / self.temperature
        if self.top_k is not None and self.top_k < logits_NV.shape[-1]:
            least_N1 = logits_NV.topk(self.top_k, dim=-1).values[:, -1:]
            logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            logits_NV = _nucleus(logits_NV, self.top_p)
        return logits_NV


def _nucleus(logits_NV: torch.Tensor, mass: float) -> torch.Tensor:
    """Keep the most probable tokens until they hold `mass`; the token that reaches it, and the first one, stay."""
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    p_NV = sorted_NV.softmax(dim=-1)
    drop_NV = p_NV.cumsum(dim=-1) - p_NV >= mass
    drop_NV[:, 0] = False
    return logits_NV.masked_fill(torch.empty_like(drop_NV).scatter_(-1, order_NV, drop_NV), -math.inf)


def _draw(logprob_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative probability passes u: one number a position, and never one of probability 0."""
    cumulative_NV = logprob_NV.double().exp().cumsum(dim=-1)
    goal_N1 = uniform_N[:, None] * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, goal_N1, right=True)[:, 0]


def uniform_numbers(seed: int, prompt: int, step: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the noise of one forward of one response, a pure function of (seed, prompt, step).

    On a grid of 2^-48, so that in float64 u * total < total always holds.
    """
    stream = np.random.Philox(key=[seed, prompt], counter=[0, 0, 0, step])
    return np.random.Generator(stream).integers(0, 2**48, size=count) / 2**48


class CommitRule(Protocol):
    """Which masked positions become tokens. It must take at least one of every row that has one, or decoding stalls."""

    def commit(self, proposal_RB: Proposal, masked_RB: torch.Tensor) -> torch.Tensor:
        """bool [R, B], True only where `masked_RB` is. What the proposal holds elsewhere has no meaning."""

    def most_steps(self, block_size: int) -> int:
        """Forwards within which every block has lost its masks."""


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every position whose confidence exceeds the threshold; if fewer than `min_commit` do, the best `min_commit`.

    confidence  0.97  0.60  0.99  0.20     threshold 0.95: positions 0 and 2
                0.50  0.60  0.30  0.20     min_commit 1:   position 1
    """

    threshold: float
    min_commit: int = 1
    acceptance: str = "sampled"

    def __post_init__(self):
        if self.min_commit < 1:
            raise ConfigError(f"min_commit {self.min_commit}: at least one token a forward, or decoding never ends")

    def commit(self, proposal_RB: Proposal, masked_RB: torch.Tensor) -> torch.Tensor:
        confidence_RB = proposal_RB.confidence(self.acceptance).masked_fill(~masked_RB, -math.inf)
        above_RB = confidence_RB > self.threshold
        rank_RB = confidence_RB.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        best_RB = masked_RB & (rank_RB < self.min_commit)
        too_few_R1 = above_RB.sum(dim=-1, keepdim=True) < self.min_commit
        return torch.where(too_few_R1, best_RB, above_RB)

    def most_steps(self, block_size: int) -> int:
        return math.ceil(block_size / self.min_commit)


@dataclasses.dataclass(frozen=True)
class Editing:
    """Token to token [L21]: a visible response token gives way to another proposal whose confidence exceeds the threshold.

    A block without masks goes on for up to `max_post_steps` forwards and ends at the first that edits nothing.
    Threshold 0.0 edits wherever the proposal differs.
    """

    threshold: float
    max_post_steps: int = 16
    acceptance: str = "sampled"

    def edit(self, proposal_RB: Proposal, tokens_RB: torch.Tensor, editable_RB: torch.Tensor) -> torch.Tensor:
        """bool [R, B], True only where `editable_RB` is: response tokens that are not masked."""
        sure_RB = proposal_RB.confidence(self.acceptance) > self.threshold
        return editable_RB & sure_RB & (proposal_RB.token != tokens_RB)


@dataclasses.dataclass(frozen=True)
class DecodeRules:
    """Everything that decides what comes out of `decode`, apart from the model and the prompts."""

    block_size: int
    max_new_tokens: int
    mask_token_id: int
    eos_token_id: int
    distribution: Distribution
    commit: CommitRule
    editing: Editing | None = None
    batch_size: int = 32
    seed: int = 0

    @classmethod
    def of(
        cls,
        keys: DecodeKeys,
        *,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        special_ids: Collection[int] = (),
    ) -> "DecodeRules":
        """The rules that the `decode` keys state; the tokenizer's ids fill in where the keys hold null.

        `special_ids` are never emitted unless they are EOS or `suppress_special` is false; the mask is one of them
        without being named. Leave out the special tokens that responses are trained to hold, as the one that ends a
        turn. Raises ConfigError without a block size, and where neither keys nor caller know the mask or EOS.
        """
        if keys.block_size is None:
            raise ConfigError("decode.block_size is null and the model does not tell it: set decode.block_size")
        mask = mask_token_id if keys.mask_token_id is None else keys.mask_token_id
        eos = eos_token_id if keys.eos_token_id is None else keys.eos_token_id
        for name, value in (("mask_token_id", mask), ("eos_token_id", eos)):
            if value is None:
                raise ConfigError(f"decode.{name} is null and no tokenizer tells it: set decode.{name}")
        if mask == eos:
            raise ConfigError(f"decode.mask_token_id and decode.eos_token_id are both {mask}: they must differ")
        suppressed = sorted({*special_ids, mask} - {eos}) if keys.suppress_special else []
        editing = None
        if keys.editing_threshold is not None:
            editing = Editing(keys.editing_threshold, keys.max_post_steps, keys.acceptance)
        return cls(
            block_size=keys.block_size,
            max_new_tokens=keys.max_new_tokens,
            mask_token_id=mask,
            eos_token_id=eos,
            distribution=Distribution(keys.temperature, keys.top_k, keys.top_p, tuple(suppressed)),
            commit=Threshold(keys.threshold, keys.min_commit, keys.acceptance),
            editing=editing,
            batch_size=keys.batch_size,
            seed=keys.seed,
        )
