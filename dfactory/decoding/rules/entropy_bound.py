"""Commit positions whose joint uncertainty is small (EB-Sampler, arXiv 2505.24857; docs/method.md#commit).

The entropies of the tokens that are committed together bound how far drawing them independently is from drawing them
jointly, and the most uncertain of them costs nothing. So the bound is on the sum of the others.
"""

import dataclasses

import torch

from dfactory.config.keys import key
from dfactory.decoding.rules.base import ENTROPY, RULES, DecodingRule, Forward


@RULES.add
@dataclasses.dataclass(frozen=True)
class EntropyBound(DecodingRule):
    """Positions by ascending entropy, as long as the entropies of those before add up to at most `entropy_bound`.

    entropy      0.30  0.02  0.50  0.06     entropy_bound 0.1: positions 1, 3 and 0
    those before 0.08  0     0.38  0.02     entropy_bound 0:   position 1
    """

    name = "entropy_bound"
    reads = (ENTROPY,)

    entropy_bound: float = key(
        0.1,
        "commit masked positions by ascending entropy while those before have at most this together, in nats; 0: one a "
        "forward, unless the model is certain of several",
        low=0.0,
    )

    def commit(self, forward: Forward) -> torch.Tensor:
        return self.within(forward[ENTROPY].masked_fill(~forward.masked_RB, torch.inf)) & forward.masked_RB

    def within(self, entropy_RB: torch.Tensor) -> torch.Tensor:
        """bool [R, B]: the positions within the bound."""
        sorted_RB, order_RB = entropy_RB.sort(dim=-1, stable=True)
        before_RB = sorted_RB.cumsum(dim=-1).roll(1, dims=-1)
        before_RB[:, 0] = 0.0
        within_RB = before_RB <= self.entropy_bound
        return torch.zeros_like(within_RB).scatter(-1, order_RB, within_RB)
