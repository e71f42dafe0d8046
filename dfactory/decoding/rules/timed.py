"""Commit by a schedule of times, as Dream's sampler does (docs/method.md#commit)."""

import dataclasses
import math

import torch

from dfactory.config.keys import key
from dfactory.decoding.rules.base import CONFIDENCE, ENTROPY, MARGIN, RULES, DecodingRule, Forward

_SCORES = {"confidence": (CONFIDENCE, 1), "margin": (MARGIN, 1), "entropy": (ENTROPY, -1)}  # the largest comes first


@RULES.add
@dataclasses.dataclass(frozen=True)
class Timed(DecodingRule):
    """In `time_steps` forwards, the best of the masks left, as many as a time that falls evenly from 1 to `time_end` says.

    From time t to s these are floor(masks x (1 - s / t)): the first forwards may commit nothing, the last commits the rest.

    5 masks, 5 steps, time_end 0.001    t 1.0 0.8 0.6 0.4 0.2    commits 0 1 1 1 2
    """

    name = "timed"
    reads = (CONFIDENCE, ENTROPY, MARGIN)
    may_wait = True

    time_steps: int = key(32, "forwards of a block", low=1)
    time_end: float = key(0.001, "time of the last forward's end", low=0.0, high=0.999)
    time_order: str = key("confidence", "which masks come first", choices=tuple(_SCORES))

    def __post_init__(self):
        object.__setattr__(self, "reads", (_SCORES[self.time_order][0],))  # the other columns are not computed

    def commit(self, forward: Forward) -> torch.Tensor:
        column, sign = _SCORES[self.time_order]
        score_RB = (sign * forward[column]).masked_fill(~forward.masked_RB, -math.inf)
        rank_RB = score_RB.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        time = torch.linspace(1, self.time_end, self.time_steps + 1).to(forward.step_R.device)
        masks_R, step_R = forward.masked_RB.sum(dim=-1), forward.step_R.clamp(max=self.time_steps - 1)
        due_R = (masks_R * (1 - time[step_R + 1] / time[step_R])).long()  # float32, in which the original rounds too
        return forward.masked_RB & (rank_RB < due_R[:, None])

    def most_steps(self, block_size: int) -> int:
        return self.time_steps
