"""What to commit and what to edit: the rules of docs/method.md#decoding as arithmetic on tensors, without a model.

A forward gives the open positions of a block their logits; the rules turn them into a decision:

    logits --Distribution--> Proposal --Acceptance--> confidence --Threshold--> which masks become tokens
                                                                 --Editing----> which tokens become other tokens

Confidence, sample and recorded log-probability come from one distribution, the processed one: special tokens suppressed,
then temperature, top-k and top-p. At temperature 0 the token is the most probable one and the distribution is the
plain softmax, without top-k and top-p.

With acceptance `top`, the confidence of a mask is a function of the distributions alone, whatever penalty or schedule there
is: these choose the positions, and the tokens at them are drawn independently. So the probability of a trace without edits
is exactly the product of the recorded ones. Edits look at what was drawn: where a draw does not exceed the editing threshold
the token stays, and that event is not recorded.

Letters: N scored positions, R responses that are decoded together, B block size, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dfactory.config.decode import STEP_SCHEDULES, DecodeKeys, decode_problem, most_steps
from dfactory.errors import ConfigError


class Proposal(NamedTuple):
    """What the model would put at each position; tensors of one shape.

    vocabulary (a b c) with p = (0.5 0.3 0.2), b drawn:  token b   logprob ln 0.3   top_token a   top_logprob ln 0.5
    """

    token: torch.Tensor  # int64
    logprob: torch.Tensor  # float32, of `token` under the processed distribution
    top_token: torch.Tensor  # int64, the most probable one
    top_logprob: torch.Tensor  # float32, its


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
            return Proposal(token_N, logprob_N, token_N, logprob_N)
        logprob_NV = logits_NV.log_softmax(dim=-1)
        token_N = _draw(logprob_NV, uniform_N)
        top_logprob_N, top_token_N = logprob_NV.max(dim=-1)
        return Proposal(token_N, logprob_NV.gather(-1, token_N[:, None])[:, 0], top_token_N, top_logprob_N)

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


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """From a proposal to the confidence of a mask: the probability of `token` (`sampled`) or of `top_token` (`top`); and to
    that of an edit, which is always the probability of the token that it writes.

    EOS early rejection (CJ-GRPO; docs/method.md#acceptance): where that token is EOS, confidence is multiplied by a
    factor that rises linearly over the `num_steps` forwards that a block with masks may take. As it looks at the token
    whose probability is compared, with `top` it does not depend on what was drawn; the authors' code looks at the token
    drawn.

    eos_penalty 0.6, num_steps 4    step    0    1    2    3    no mask left
                                    factor  0.4  0.6  0.8  1    1
    """

    by: str = "sampled"
    eos_penalty: float = 0.0
    eos_token_id: int = -1
    num_steps: int = 1

    def confidence(self, proposal_RB: Proposal, masked_RB: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        """Of committing, float32 [R, B]. `step_R`: forwards that the block of each row has taken with masks, before this
        one."""
        logprob_RB = proposal_RB.logprob if self.by == "sampled" else proposal_RB.top_logprob
        return self._early(self.compared(proposal_RB), logprob_RB, masked_RB, step_R)

    def edit_confidence(self, proposal_RB: Proposal, masked_RB: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        """Of editing, float32 [R, B]."""
        return self._early(proposal_RB.token, proposal_RB.logprob, masked_RB, step_R)

    def compared(self, proposal_RB: Proposal) -> torch.Tensor:
        """The tokens whose probability a commit is judged by."""
        return proposal_RB.token if self.by == "sampled" else proposal_RB.top_token

    def _early(self, token_RB, logprob_RB, masked_RB: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        """Probabilities, those of EOS lowered early in a block."""
        if self.eos_penalty == 0:
            return logprob_RB.exp()
        progress_R = torch.where(masked_RB.any(dim=-1), step_R / max(self.num_steps - 1, 1), 1.0)
        factor_R1 = (1 - self.eos_penalty * (1 - progress_R))[:, None]
        return logprob_RB.exp() * torch.where(token_RB == self.eos_token_id, factor_R1, 1.0)


def least_counts(masks_R: torch.Tensor, steps_left_R: torch.Tensor, schedule: str) -> torch.Tensor:
    """How many of `masks_R` masks the next of `steps_left_R` steps commits, int64 [R]; at least 1.

    Told anew at every step, so that it also holds where a step commits more, and where prompt or draft fill a part of
    the block. `ascending` (CJ-GRPO; docs/method.md#commit): as if the steps left took 1, 2, 4, ... of 2^steps - 1 equal
    shares; a share is rounded down, and the last step takes the rest. Fewer masks than steps: one a step, and the block
    ends early.

    32 masks, 6 steps   even  6 6 5 5 5 5   ascending  1 1 2 4 8 16      10 masks, 3 steps   even  4 3 3   ascending  1 3 6
    """
    if schedule == "even":
        return -(-masks_R // steps_left_R)
    shares_R = 2 ** steps_left_R.clamp(max=62) - 1  # beyond, no share reaches one token, and int64 ends
    return (masks_R // shares_R).clamp(min=1)


class CommitRule(Protocol):
    """Which masked positions become tokens. It must take at least one of every row that has one, or decoding stalls."""

    def commit(self, confidence_RB: torch.Tensor, masked_RB: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        """bool [R, B], True only where `masked_RB` is. What `confidence_RB` holds elsewhere has no meaning; `step_R` as
        in `Acceptance.confidence`."""

    def most_steps(self, block_size: int) -> int:
        """Forwards within which every block has lost its masks."""


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every position whose confidence exceeds the threshold; if fewer than `min_commit` do, the best `min_commit`.

    confidence  0.97  0.60  0.99  0.20     threshold 0.95: positions 0 and 2
                0.50  0.60  0.30  0.20     min_commit 1:   position 1

    With `steps`, the least number is that of `least_counts` instead; with threshold 1.0 it is also the most.
    """

    threshold: float
    min_commit: int = 1
    steps: int | None = None
    schedule: str = "even"

    def __post_init__(self):
        if self.min_commit < 1:
            raise ConfigError(f"min_commit {self.min_commit}: at least one token a forward, or decoding never ends")
        if self.schedule not in STEP_SCHEDULES:
            raise ConfigError(f"step_schedule {self.schedule}: it must be one of {', '.join(STEP_SCHEDULES)}")

    def commit(self, confidence_RB: torch.Tensor, masked_RB: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        confidence_RB = confidence_RB.masked_fill(~masked_RB, -math.inf)
        above_RB = confidence_RB > self.threshold
        rank_RB = confidence_RB.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        least_R1 = self._least(masked_RB.sum(dim=-1), step_R)[:, None]
        best_RB = masked_RB & (rank_RB < least_R1)
        too_few_R1 = above_RB.sum(dim=-1, keepdim=True) < least_R1
        return torch.where(too_few_R1, best_RB, above_RB)

    def _least(self, masks_R: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        if self.steps is None:
            return torch.full_like(masks_R, self.min_commit)
        return least_counts(masks_R, (self.steps - step_R).clamp(min=1), self.schedule)

    def most_steps(self, block_size: int) -> int:
        return most_steps(block_size, self.min_commit, self.steps)


@dataclasses.dataclass(frozen=True)
class Editing:
    """Token to token (LLaDA2.1; docs/method.md#editing): a visible response token gives way to the token drawn if that
    one's own probability exceeds the threshold. With acceptance `top` the most probable token never gives way, whatever
    was drawn.

    A block without masks goes on for up to `max_post_steps` forwards and ends at the first that edits nothing.
    Threshold 0.0 edits wherever the model would have another token.
    """

    threshold: float
    max_post_steps: int = 16

    def edit(self, confidence_RB: torch.Tensor, differs_RB: torch.Tensor, editable_RB: torch.Tensor) -> torch.Tensor:
        """bool [R, B], True only where `editable_RB` is: response tokens that are not masked. `confidence_RB` is that of the
        tokens that would be written, `differs_RB` where the model would have another token than the one there."""
        return editable_RB & differs_RB & (confidence_RB > self.threshold)


@dataclasses.dataclass(frozen=True)
class DecodeRules:
    """Everything that decides what comes out of `decode`, apart from the model and the prompts."""

    block_size: int
    max_new_tokens: int
    mask_token_id: int
    eos_token_id: int
    distribution: Distribution
    acceptance: Acceptance
    commit: CommitRule
    editing: Editing | None = None
    batch_size: int = 32
    seed: int = 0
    cuda_graphs: bool = False

    def decide(
        self,
        proposal_RB: Proposal,
        tokens_RB: torch.Tensor,
        masked_RB: torch.Tensor,
        editable_RB: torch.Tensor,
        step_R: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which masks become the tokens proposed, and which of the `editable_RB` tokens: bool [R, B] twice. `step_R` as in
        `Acceptance.confidence`."""
        confidence_RB = self.acceptance.confidence(proposal_RB, masked_RB, step_R)
        commit_RB = self.commit.commit(confidence_RB, masked_RB, step_R)
        if self.editing is None:
            return commit_RB, torch.zeros_like(commit_RB)
        differs_RB = (proposal_RB.token != tokens_RB) & (self.acceptance.compared(proposal_RB) != tokens_RB)
        confidence_RB = self.acceptance.edit_confidence(proposal_RB, masked_RB, step_R)
        return commit_RB, self.editing.edit(confidence_RB, differs_RB, editable_RB)

    @property
    def deciding(self) -> tuple:
        """What makes a decision of a forward's logits: responses in which it is equal can be decided together."""
        return self.distribution, self.acceptance, self.commit, self.editing

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
        turn. Raises ConfigError without a block size, where neither keys nor caller know the mask or EOS, and for keys
        that make no sense together.
        """
        if keys.block_size is None:
            raise ConfigError("decode.block_size is null and the model does not tell it: set decode.block_size")
        problem = decode_problem(keys, keys.block_size)
        if problem is not None:
            raise ConfigError(problem)
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
            editing = Editing(keys.editing_threshold, keys.max_post_steps)
        commit = Threshold(keys.threshold, keys.min_commit, keys.steps, keys.step_schedule)
        num_steps = commit.most_steps(keys.block_size)
        return cls(
            block_size=keys.block_size,
            max_new_tokens=keys.max_new_tokens,
            mask_token_id=mask,
            eos_token_id=eos,
            distribution=Distribution(keys.temperature, keys.top_k, keys.top_p, tuple(suppressed)),
            acceptance=Acceptance(keys.acceptance, keys.eos_penalty, eos, num_steps),
            commit=commit,
            editing=editing,
            batch_size=keys.batch_size,
            seed=keys.seed,
            cuda_graphs=keys.cuda_graphs,
        )
