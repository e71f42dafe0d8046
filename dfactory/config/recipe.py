"""The whole recipe: flat, with TRL's and transformers' names."""

import math
from dataclasses import dataclass

from dfactory.config.data import DataKeys
from dfactory.config.decode import DecodeKeys
from dfactory.config.editing import EditingKeys
from dfactory.config.keys import key
from dfactory.config.merge import small_is_good
from dfactory.config.model import ModelKeys
from dfactory.config.noise import NoiseKeys
from dfactory.config.objective import PAIRED_STAGES, ObjectiveKeys
from dfactory.config.rl import RLKeys
from dfactory.config.training import TrainingKeys


@dataclass
class Recipe(TrainingKeys, RLKeys, ObjectiveKeys, EditingKeys, NoiseKeys, DataKeys, ModelKeys):
    decode: DecodeKeys = key(DecodeKeys, "how prompts are decoded during training")

    @property
    def edits(self) -> bool:
        """Whether visible tokens are targets too."""
        return self.edit_share > 0 or self.num_turns > 1

    @property
    def views_per_turn(self) -> int:
        return self.num_views * (2 if self.complementary else 1)

    @property
    def views_per_document(self) -> int:
        """K: the views that a document gets in one row."""
        return self.views_per_turn * self.num_turns

    @property
    def block_phases(self) -> list[tuple[int, int]]:
        """(first step, block size) of each phase of the run; one phase without a schedule."""
        return [(first, size) for first, size in self.block_size_schedule or [[0, self.block_size]]]

    def block_size_at(self, step: int) -> int:
        """The block size of a step, counted from 0."""
        return next(size for first, size in reversed(self.block_phases) if first <= step)

    def warmup_of(self, num_steps: int) -> int:
        """Steps of the warmup in a run of so many."""
        return math.ceil(self.warmup_steps * num_steps) if self.warmup_steps < 1 else round(self.warmup_steps)

    @property
    def smaller_is_better(self) -> bool:
        """Of metric_for_best_model."""
        if self.greater_is_better is not None:
            return not self.greater_is_better
        return small_is_good(self.metric_for_best_model or "")

    @property
    def documents_per_record(self) -> int:
        return 2 if self.stage in PAIRED_STAGES else 1

    @property
    def reference_kind(self) -> str | None:
        """What gives the scores of the initial model that the objective compares with: a frozen `copy`, the policy with its
        `adapter` off, or `precomputed` ones; None where it compares with nothing."""
        if self.stage in PAIRED_STAGES:
            return self.reference or ("adapter" if self.use_peft else "copy")
        if self.stage == "rl" and self.kl_coef:
            return "adapter" if self.use_peft else "copy"
        return None

    @property
    def frozen_models(self) -> tuple[str, ...]:
        """The models that a learner holds beside the one in training: assembly loads these and no others, and the memory
        forecast has a line of this name for each."""
        return ("reference",) if self.reference_kind == "copy" else ()

    @property
    def highest_epsilon(self) -> float:
        """What `epsilon_high` null stands for."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def decodes_ahead(self) -> bool:
        """Whether rollouts may be stale: there are new weights every num_iterations versions."""
        return self.max_staleness >= self.num_iterations

    @property
    def actors_score(self) -> bool:
        """Whether rollout actors say how likely the views of their rollouts are. A trace is recorded as it is decoded, but
        at another temperature that is not what the learner's ratio compares."""
        recorded = self.policy_loss == "trace" and self.decode.temperature == 1
        return self.decodes_ahead and self.old_policy == "decoder" and not recorded

    @property
    def longest_record(self) -> int:
        """Row positions that a record of max_length takes at most, its views included."""
        return self.documents_per_record * self.max_length * (1 + self.views_per_document)
