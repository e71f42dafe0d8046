"""`dtype: auto` of a recipe: which precision a run takes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from dfactory.models.precision import faster_precision, slow_on
from dfactory.recipe import Recipe
from dfactory.runs.folder import recipe_of

AUTO = "auto"


class Settled(NamedTuple):
    dtype: str  # bfloat16 or float32
    note: str | None  # why, where it was the run's own choice

    def recipe(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(recipe, dtype=self.dtype)


def settled(recipe: Recipe, on: str, candidates: Sequence[Path] = ()) -> Settled:
    """The precision that `dtype` stands for.

    `on`: the device that trains, `cpu` or `cuda`. `candidates`: the checkpoints that a run may resume from, the best
    first. Their precision stays, whatever is faster on this machine: the optimiser's state is stored by it.
    """
    if recipe.dtype != AUTO:
        return Settled(recipe.dtype, None)
    for checkpoint in candidates:
        if (dtype := _recorded(checkpoint)) is not None:
            return Settled(dtype, f"dtype {dtype}, as in {checkpoint}")
    dtype, reason = faster_precision(on)
    return Settled(dtype, f"dtype {dtype}: {reason}")


def slow_precision(recipe: Recipe, on: str) -> list[str]:
    """A warning where the device computes the recipe's precision slowly."""
    if recipe.dtype != "bfloat16" or (reason := slow_on(on)) is None:
        return []
    return [f"dtype bfloat16: {reason}. dtype=auto takes the faster one"]


def _recorded(checkpoint: Path) -> str | None:
    """None where it cannot be read: who resumes from it raises the error."""
    if (file := recipe_of(checkpoint)) is None:
        return None
    try:
        keys = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    dtype = keys.get("dtype") if isinstance(keys, dict) else None
    return dtype if dtype in ("bfloat16", "float32") else None
