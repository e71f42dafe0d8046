"""Commit positions where the best token leads the second by enough."""

import dataclasses

import torch

from dfactory.config.keys import key
from dfactory.decoding.rules.base import MARGIN, RULES, DecodingRule, Forward


@RULES.add
@dataclasses.dataclass(frozen=True)
class Margin(DecodingRule):
    """Every position whose margin exceeds `least_margin`, and always the one with the largest."""

    name = "margin"
    reads = (MARGIN,)

    least_margin: float = key(0.5, "commit where the best token leads the second by more", low=0.0, high=1.0)

    def commit(self, forward: Forward) -> torch.Tensor:
        margin_RB = forward[MARGIN].masked_fill(~forward.masked_RB, -1.0)
        best_RB = margin_RB == margin_RB.amax(dim=-1, keepdim=True)
        return forward.masked_RB & ((margin_RB > self.least_margin) | best_RB)
