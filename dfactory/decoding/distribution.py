"""The processed distribution of each position, and what is drawn from it (docs/method.md#decoding).

Confidence, sample and recorded log-probability come from one distribution, the processed one: logits guided away from
those without the prompt, special tokens suppressed, then temperature, top-k and top-p. At temperature 0 the token is the
most probable one and the distribution is the plain softmax, without top-k and top-p.

Letters: N scored positions, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from dfactory.decoding.rules.base import Column, Proposal

LIKELY = 256  # tokens among which the nucleus is looked for first
DRAWS, CHANCES = 0, 1  # streams of random numbers: which token is drawn, and what a rule leaves to chance


@dataclasses.dataclass(frozen=True)
class Distribution:
    """From logits to the distribution that tokens are drawn from."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    suppressed_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()  # those that cannot come out early in a response
    cfg_scale: float = 0.0  # classifier-free guidance

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def guided(self, logits_N2V: torch.Tensor) -> torch.Tensor:
        """[N, V] from logits with the prompt and without it: what the prompt adds counts 1 + cfg_scale times."""
        logits_NV, without_NV = logits_N2V.unbind(dim=1)
        if self.cfg_scale == 0:
            return logits_NV
        return without_NV + (self.cfg_scale + 1) * (logits_NV - without_NV)

    def propose(self, logits_NV: torch.Tensor, uniform_N: torch.Tensor | None = None) -> Proposal:
        """Draw a token for every position. `uniform_N`: float64 in [0, 1), not needed when greedy."""
        return self._proposed(self.processed(logits_NV), uniform_N)

    def read(
        self,
        logits_NV: torch.Tensor,
        uniform_N: torch.Tensor | None = None,
        columns: Sequence[Column] = (),
        last_NV: torch.Tensor | None = None,
        early_N: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The fields of the proposal followed by the columns, and the log-probabilities [N, V] that the columns are made of.
        `last_NV` are those of the last forward, for columns that compare; `early_N` says where `end_ids` cannot come out. A
        column costs a pass over the vocabulary, so without columns there are no log-probabilities."""
        logits_NV = self.processed(logits_NV, early_N)
        proposal = self._proposed(logits_NV, uniform_N)
        if not columns:
            return list(proposal), None
        logprob_NV = logits_NV.log_softmax(dim=-1)
        numbers = [column.of(logprob_NV, *((last_NV,) if column.compares else ())) for column in columns]
        return [*proposal, *numbers], logprob_NV

    def _proposed(self, logits_NV: torch.Tensor, uniform_N: torch.Tensor | None) -> Proposal:
        """Of processed logits."""
        if self.is_greedy:
            top_N, token_N = logits_NV.max(dim=-1)
            # the operations of torch.logsumexp, which looks for the largest logits itself
            log_sum_N = (logits_NV - top_N[:, None]).exp_().sum(dim=-1).log_().add_(top_N)
            logprob_N = top_N - log_sum_N
            return Proposal(token_N, logprob_N, token_N, logprob_N)
        logprob_NV = logits_NV.log_softmax(dim=-1)
        token_N = draw(logprob_NV, uniform_N)
        top_logprob_N, top_token_N = logprob_NV.max(dim=-1)
        return Proposal(token_N, logprob_NV.gather(-1, token_N[:, None])[:, 0], top_token_N, top_logprob_N)

    def processed(self, logits_NV: torch.Tensor, early_N: torch.Tensor | None = None) -> torch.Tensor:
        """float32 logits of the processed distribution: -inf where a token cannot come out. A copy, which each operation
        overwrites: a pass over a large vocabulary costs as much as a layer of a small model."""
        logits_NV = logits_NV.to(torch.float32, copy=True)
        if self.suppressed_ids:
            suppressed = torch.tensor(self.suppressed_ids, device=logits_NV.device)
            logits_NV.index_fill_(-1, suppressed, -math.inf)
        for end in self.end_ids if early_N is not None else ():
            logits_NV[:, end].masked_fill_(early_N, -math.inf)
        if self.is_greedy:
            return logits_NV
        if self.temperature != 1:
            logits_NV.div_(self.temperature)
        if self.top_k is not None and self.top_k < logits_NV.shape[-1]:
            least_N1 = logits_NV.topk(self.top_k, dim=-1).values[:, -1:]
            logits_NV.masked_fill_(logits_NV < least_N1, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            logits_NV = _nucleus(logits_NV, self.top_p)
        return logits_NV


def _nucleus(logits_NV: torch.Tensor, mass: float) -> torch.Tensor:
    """Keep the most probable tokens until they hold `mass`; the token that reaches it, and the first one, stay. Of equal
    ones the lower id comes first."""
    if logits_NV.is_cuda or logits_NV.shape[-1] <= LIKELY:
        return _sorted_nucleus(logits_NV, mass)
    # On a CPU sorting a vocabulary takes as long as a small model's forward, and a few of its tokens are mostly enough.
    id_NK = logits_NV.topk(LIKELY, dim=-1).indices.sort(dim=-1).values
    sorted_NK, order_NK = logits_NV.gather(-1, id_NK).sort(dim=-1, descending=True, stable=True)
    drop_NK = _beyond((sorted_NK - logits_NV.logsumexp(dim=-1, keepdim=True)).exp(), mass)
    least_N1 = sorted_NK.gather(-1, (~drop_NK).sum(dim=-1, keepdim=True) - 1)
    kept_NK = sorted_NK.masked_fill(drop_NK, -math.inf)
    kept_NV = torch.full_like(logits_NV, -math.inf).scatter_(-1, id_NK.gather(-1, order_NK), kept_NK)
    short_N = least_N1[:, 0] <= sorted_NK[:, -1]  # others may belong to them, or are equal to the last
    if short_N.any():
        kept_NV[short_N] = _sorted_nucleus(logits_NV[short_N], mass)
    return kept_NV


def _sorted_nucleus(logits_NV: torch.Tensor, mass: float) -> torch.Tensor:
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    drop_NV = _beyond(sorted_NV.softmax(dim=-1), mass)
    return logits_NV.masked_fill(torch.empty_like(drop_NV).scatter_(-1, order_NV, drop_NV), -math.inf)


def _beyond(p_NK: torch.Tensor, mass: float) -> torch.Tensor:
    """bool: which of the descending probabilities come after those that hold `mass`; never the first."""
    drop_NK = p_NK.cumsum(dim=-1) - p_NK >= mass
    drop_NK[:, 0] = False
    return drop_NK


def draw(logprob_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative probability passes u: one number a position, and never one of probability 0."""
    cumulative_NV = logprob_NV.double().exp_()  # as large as two copies of the logits: no further ones
    torch.cumsum(cumulative_NV, dim=-1, out=cumulative_NV)
    goal_N1 = uniform_N[:, None] * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, goal_N1, right=True)[:, 0]


def uniform_numbers(seed: int, prompt: int, step: int, count: int, stream: int = DRAWS) -> np.ndarray:
    """float64 [count] in [0, 1): the noise of one forward of one response, a pure function of (seed, prompt, step, stream).

    On a grid of 2^-48, so that in float64 u * total < total always holds.
    """
    generator = np.random.Philox(key=[seed, prompt], counter=[0, 0, stream, step])
    return np.random.Generator(generator).integers(0, 2**48, size=count) / 2**48
