"""What algorithms share that learn from pairs and compare with the initial model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

from dfactory.algorithms.base import Algorithm, Data, Needs
from dfactory.config.keys import key


@dataclass
class PairedKeys:
    beta: float = key(0.1, "how closely the policy keeps to the reference; larger is closer", low=0.0)
    reference: Optional[str] = key(
        None,
        "a frozen copy of the initial model, the model without its adapters, or the initial model's scores computed once; "
        "null: adapter with use_peft, else copy",
        choices=("copy", "adapter", "precomputed"),
    )
    reference_path: Optional[str] = key(
        None, "precomputed reference of an earlier run (its reference.safetensors); null: compute it, in output_dir"
    )


class Paired(Algorithm):
    data = Data.PAIRS
    Keys = PairedKeys

    def problems(self, recipe: Any) -> Iterator[str]:
        if recipe.reference == "adapter" and not recipe.use_peft:
            yield (
                "reference adapter without use_peft: there is no adapter to switch off; set use_peft, or reference to copy"
            )
        if recipe.frozen_models and recipe.expert_parallel_size > 1:
            yield (
                f"expert_parallel_size {recipe.expert_parallel_size} with reference copy is not supported: set reference "
                "to precomputed"
            )
        if recipe.reference_path is not None and recipe.reference != "precomputed":
            yield (
                f"reference_path {recipe.reference_path} is read with reference precomputed only: set that, or leave it out"
            )
        if recipe.edits:
            yield (
                f"{self.selector} with edit_share {recipe.edit_share:g}, num_turns {recipe.num_turns}: its likelihoods are "
                "sums over masked targets; set edit_share 0, num_turns 1"
            )

    def needs(self, recipe: Any) -> Needs:
        return Needs(reference=True)

    def dividing_key(self, recipe: Any) -> str | None:
        return self.selector
