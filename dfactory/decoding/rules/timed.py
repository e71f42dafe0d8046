"""Commit by a schedule of times, as Dream's sampler does (docs/method.md#commit)."""

import dataclasses
import math

import torch

from dfactory.config.keys import key
from dfactory.decoding.rules.base import CHANCE, CONFIDENCE, ENTROPY, MARGIN, RULES, DecodingRule, Forward

_SCORES = {"confidence": (CONFIDENCE, 1), "margin": (MARGIN, 1), "entropy": (ENTROPY, -1)}  # the largest comes first
_COLUMNS = {order: column for order, (column, _) in _SCORES.items()} | {"random": CHANCE}


@RULES.add
@dataclasses.dataclass(frozen=True)
class Timed(DecodingRule):
    """In `time_steps` forwards, the best of the masks left, as many as a time that falls evenly from 1 to `time_end` says.

    From time t to s these are floor(masks x (1 - s / t)): the first forwards may commit nothing, the last commits the rest.
    With `time_order: random` each mask is committed with chance 1 - s / t instead, whatever the model says.

    5 masks, 5 steps, time_end 0.001    t 1.0 0.8 0.6 0.4 0.2    commits 0 1 1 1 2
    """

    name = "timed"
    reads = (CONFIDENCE, ENTROPY, MARGIN, CHANCE)
    may_wait = True

    time_steps: int = key(32, "forwards of a block", low=1)
    time_end: float = key(0.001, "time of the last forward's end", low=0.0, high=0.999)
    time_order: str = key(
        "confidence", "which masks come first; random: each with the same chance", choices=tuple(_COLUMNS)
    )

    def __post_init__(self):
        object.__setattr__(self, "reads", (_COLUMNS[self.time_order],))  # the other columns are not computed

    def commit(self, forward: Forward) -> torch.Tensor:
        share_R1 = self._share(forward.step_R)[:, None]
        if self.time_order not in _SCORES:
            return forward.masked_RB & (forward[CHANCE] < share_R1)
        column, sign = _SCORES[self.time_order]
        score_RB = (sign * forward[column]).masked_fill(~forward.masked_RB, -math.inf)
        rank_RB = score_RB.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        due_R1 = (forward.masked_RB.sum(dim=-1, keepdim=True) * share_R1).long()
        return forward.masked_RB & (rank_RB < due_R1)

    def _share(self, step_R: torch.Tensor) -> torch.Tensor:
        """1 - s / t, in float32, in which the original rounds too."""
        time = torch.linspace(1, self.time_end, self.time_steps + 1).to(step_R.device)
        step_R = step_R.clamp(max=self.time_steps - 1)
        return 1 - time[step_R + 1] / time[step_R]

    def most_steps(self, block_size: int) -> int:
        return self.time_steps
