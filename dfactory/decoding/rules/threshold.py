"""Commit what the model is sure enough of, or fixed counts (LLaDA2.0, LLaDA, SDAR, dllm; docs/method.md#commit)."""

import dataclasses
import math
from typing import Optional

import torch

from dfactory.config.keys import key
from dfactory.decoding.counts import SCHEDULES, least_counts
from dfactory.decoding.rules.base import CONFIDENCE, RULES, DecodingRule, Forward, Served
from dfactory.errors import ConfigError


@RULES.add
@dataclasses.dataclass(frozen=True)
class Threshold(DecodingRule):
    """Every position whose confidence exceeds the threshold; if fewer than `min_commit` do, the best `min_commit`.

    confidence  0.97  0.60  0.99  0.20     threshold 0.95: positions 0 and 2
                0.50  0.60  0.30  0.20     min_commit 1:   position 1

    With `steps`, the least number is that of `least_counts` instead; with threshold 1.0 it is also the most.
    """

    name = "threshold"
    is_default = True

    threshold: float = key(0.95, "commit a masked position when its confidence exceeds this", low=0.0, high=1.0)
    min_commit: int = key(1, "commit at least so many a forward, the most confident first", low=1)
    steps: Optional[int] = key(
        None,
        "forwards in which a block loses its masks, shared out by step_schedule; takes the place of min_commit. threshold "
        "1.0: exactly so many; lower: positions above it are committed as well, so fewer. null: min_commit decides",
        low=1,
    )
    step_schedule: str = key(
        "even",
        "the least that each of a block's steps commits. even: the same, what is left over with the first (10 in 3 steps: "
        "4 3 3); rounded: masks left over steps left, to the nearest number (3 3 4); ascending: twice as much each time as "
        "far as whole tokens allow (32 in 6 steps: 1 1 2 4 8 16); these add up to the block's masks. block: even shares of "
        "block_size, also of a block that a prompt fills in part, which then ends early",
        choices=tuple(SCHEDULES),
    )

    def __post_init__(self):
        if self.min_commit < 1:
            raise ConfigError(f"min_commit {self.min_commit}: at least one token a forward, or decoding never ends")
        if self.step_schedule not in SCHEDULES:
            raise ConfigError(f"step_schedule {self.step_schedule}: it must be one of {', '.join(SCHEDULES)}")

    def commit(self, forward: Forward) -> torch.Tensor:
        masked_RB = forward.masked_RB
        confidence_RB = forward[CONFIDENCE].masked_fill(~masked_RB, -math.inf)
        above_RB = confidence_RB > self.threshold
        rank_RB = confidence_RB.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        least_R1 = self._least(masked_RB, forward.step_R)[:, None]
        best_RB = masked_RB & (rank_RB < least_R1)
        too_few_R1 = above_RB.sum(dim=-1, keepdim=True) < least_R1
        return torch.where(too_few_R1, best_RB, above_RB)

    def _least(self, masked_RB: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        masks_R = masked_RB.sum(dim=-1)
        if self.steps is None:
            return torch.full_like(masks_R, self.min_commit)
        return least_counts(self.step_schedule, masks_R, step_R, self.steps, masked_RB.shape[1])

    def most_steps(self, block_size: int) -> int:
        return math.ceil(block_size / self.min_commit) if self.steps is None else self.steps

    def in_sglang(self, editing_threshold: float | None, max_post_steps: int) -> Served | None:
        if self.steps is not None or self.min_commit > 1:
            return None
        if editing_threshold is None:
            return Served("LowConfidence", {"threshold": self.threshold})
        edits = {"edit_threshold": editing_threshold, "max_post_edit_steps": max_post_steps}
        return Served("JointThreshold", {"threshold": self.threshold} | edits)

    def problem(self, block_size: int | None) -> str | None:
        steps, schedule = self.steps, self.step_schedule
        if steps is not None and self.min_commit > 1:
            return (
                f"decode.min_commit {self.min_commit} with decode.steps {steps}: both say how much a forward commits at "
                "least; leave out one"
            )
        if schedule != "even" and steps is None:
            return f"decode.step_schedule {schedule} without decode.steps: set decode.steps, such as 6 for blocks of 32"
        if block_size is None:
            return None
        if steps is not None and steps > block_size:
            return f"decode.steps {steps} > block_size {block_size}: a step commits at least one token; lower it"
        if schedule == "ascending" and steps in (1, block_size):
            return (
                f"decode.step_schedule ascending with decode.steps {steps} and block_size {block_size}: no step can commit "
                "more than another; use a number between 1 and the block size, or even"
            )
        return None
