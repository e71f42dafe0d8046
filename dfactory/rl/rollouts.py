"""What goes between controller, rollout actors and learners."""

import dataclasses
from typing import NamedTuple

from dfactory.types import Rollout


class GroupCall(NamedTuple):
    """Decode G responses to one prompt."""

    number: int  # of the group in the run's order of prompts: the key under which it is answered, once
    prompt_ids: list[int]
    noise_ids: list[int]  # G of them, from the group's number: a restarted call draws the same


class DecodedGroup(NamedTuple):
    number: int
    version: int  # of the weights that made all of its rollouts
    rollouts: list[Rollout]
    seconds: float


@dataclasses.dataclass(frozen=True)
class ScoredRollout:
    """A rollout that a learner trains on."""

    group: int
    index: int  # within its group, from 0
    rollout: Rollout
    reward: float
    advantage: float


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """What one optimiser step trains on, the same on every learner."""

    rollouts: list[ScoredRollout]
    next_group: int  # the number of the first group that the next step may use
    epoch: float  # passes over the prompts, up to next_group
    metrics: dict[str, float]
