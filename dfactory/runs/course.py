"""When a run evaluates, saves and ends early, and which of its checkpoints is the best.

What an evaluation found is read from metrics.jsonl, which a resumed run continues, so that it decides as an undisturbed run
does. The first rank reads; all ranks ask together and get its answer.
"""

import math
from collections.abc import Sequence

from dfactory import distributed
from dfactory.recipe import Recipe
from dfactory.runs.folder import RunFolder


class Course:
    """Asked after each step."""

    def __init__(self, recipe: Recipe, folder: RunFolder, epoch: float):
        self.recipe, self.folder = recipe, folder
        self._epochs = int(epoch)  # whole passes over the data
        self._epoch_ended = False

    def stepped(self, epoch: float) -> None:
        """Take notice of the data's position after a step."""
        self._epoch_ended = int(epoch) > self._epochs
        self._epochs = int(epoch)

    def evaluation_is_due(self, step: int, last: bool) -> bool:
        if self.recipe.eval_strategy == "no":
            return False
        return last or self._is_due(self.recipe.eval_strategy, self.recipe.eval_steps, step)

    def save_is_due(self, step: int, last: bool, evaluated: bool) -> bool:
        """`evaluated`: whether the step was followed by an evaluation."""
        if self.recipe.save_strategy == "best" and not last:
            return evaluated and distributed.on_first_rank(lambda: last_is_best(self._values(), self._smaller))
        return last or self._is_due(self.recipe.save_strategy, self.recipe.save_steps, step)

    def ends_early(self) -> bool:
        """Whether the evaluations since the best one are as many as the recipe's patience; to be asked after one."""
        patience = self.recipe.early_stopping_patience
        if patience is None:
            return False
        stale = distributed.on_first_rank(
            lambda: stale_evaluations(self._values(), self._smaller, self.recipe.early_stopping_threshold)
        )
        return stale >= patience

    def _is_due(self, strategy: str, every: int | None, step: int) -> bool:
        if strategy == "epoch":
            return self._epoch_ended
        return strategy == "steps" and every is not None and step % every == 0

    @property
    def _smaller(self) -> bool:
        return self.recipe.smaller_is_better

    def _values(self) -> list[float]:
        """The metric of every evaluation so far; NaN where it was not finite."""
        name = self.recipe.metric_for_best_model
        found = [row[name] for row in self.folder.metrics() if name in row]
        return [math.nan if value is None else value for value in found]


def stale_evaluations(values: Sequence[float], smaller_is_better: bool, threshold: float = 0.0) -> int:
    """How many evaluations have passed since one was better than all before it by more than the threshold.

    >>> stale_evaluations([3.0, 2.0, 2.5, 1.95], True, threshold=0.1)
    2
    """
    best, stale = -math.inf, 0
    for value in values:
        gain = -value if smaller_is_better else value
        better = gain > best + threshold  # never for NaN
        best, stale = (gain, 0) if better else (best, stale + 1)
    return stale


def last_is_best(values: Sequence[float], smaller_is_better: bool) -> bool:
    return bool(values) and stale_evaluations(values, smaller_is_better) == 0
