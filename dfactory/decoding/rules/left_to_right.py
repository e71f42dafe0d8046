"""Commit in the order of reading (SDAR's sequential order; docs/method.md#commit)."""

import dataclasses

import torch

from dfactory.config.keys import key
from dfactory.decoding.rules.base import RULES, DecodingRule, Forward


@RULES.add
@dataclasses.dataclass(frozen=True)
class LeftToRight(DecodingRule):
    """The leftmost `tokens_per_step` masks.

    masks  1 0 1 1     tokens_per_step 2: positions 0 and 2
    """

    name = "left_to_right"
    reads = ()

    tokens_per_step: int = key(1, "commit so many a forward, from left to right", low=1)

    def commit(self, forward: Forward) -> torch.Tensor:
        return forward.masked_RB & (forward.masked_RB.cumsum(dim=-1) <= self.tokens_per_step)

    def most_steps(self, block_size: int) -> int:
        return -(-block_size // self.tokens_per_step)
