"""What algorithms share that train on records as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dfactory.algorithms.base import Algorithm
from dfactory.config.keys import key


@dataclass
class SupervisedKeys:
    loss_weight: str = key(
        "uniform",
        "weight of a target: 1 over the number of targets, or 1/t over the number of response tokens (ELBO)",
        choices=("uniform", "elbo"),
    )


class Supervised(Algorithm):
    Keys = SupervisedKeys

    def problems(self, recipe: Any) -> Iterator[str]:
        if recipe.edits and recipe.loss_weight != "uniform":
            yield (
                f"loss_weight {recipe.loss_weight} with edit_share {recipe.edit_share:g}, num_turns {recipe.num_turns}: "
                "1/t has a meaning for masked targets only; use uniform"
            )

    def dividing_key(self, recipe: Any) -> str | None:
        return f"loss_weight {recipe.loss_weight}" if recipe.loss_weight == "elbo" else None
