"""What goes between controller, rollout actors and learners."""

import dataclasses
from typing import NamedTuple

import numpy as np

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
    old_logprobs: list[np.ndarray] | None = None  # of each rollout, as ScoredRollout.old_logprob
    decoder_gap: float | None = None  # RolloutActor.decoder_gap, where it was measured


@dataclasses.dataclass(frozen=True)
class ScoredRollout:
    """A rollout that a learner trains on."""

    group: int
    index: int  # within its group, from 0
    rollout: Rollout
    reward: float
    advantage: float
    version: int | None = None  # of the weights that decoded it; None: those that the learner has now
    old_logprob: np.ndarray | None = dataclasses.field(default=None, compare=False)
    """float32: log-probabilities of the targets of its views under that version, in the order of rows.py's
    `target_number_N`; None where the rollout actor did not score it."""


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """What one optimiser step trains on, the same on every learner."""

    rollouts: list[ScoredRollout]
    next_group: int  # the number of the first group that the next step may use
    epoch: float  # passes over the prompts, up to next_group
    metrics: dict[str, float]
