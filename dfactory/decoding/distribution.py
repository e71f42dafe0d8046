"""The processed distribution of each position, and what is drawn from it (docs/method.md#decoding).

Confidence, sample and recorded log-probability come from one distribution, the processed one: special tokens suppressed,
then temperature, top-k and top-p. At temperature 0 the token is the most probable one and the distribution is the
plain softmax, without top-k and top-p.

Letters: N scored positions, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from dfactory.decoding.rules.base import Column, Proposal


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
        return self._proposed(self._processed(logits_NV), uniform_N)

    def read(
        self,
        logits_NV: torch.Tensor,
        uniform_N: torch.Tensor | None = None,
        columns: Sequence[Column] = (),
        last_NV: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The fields of the proposal followed by the columns, and the log-probabilities [N, V] that the columns are made of.
        `last_NV` are those of the last forward, for columns that compare. A column costs a pass over the vocabulary, so
        without columns there are no log-probabilities."""
        logits_NV = self._processed(logits_NV)
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
