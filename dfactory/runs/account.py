"""Keeps the account of a run for its checkpoints: the lineage of the model in training (lineage.py).

The first rank has one. What takes time, the sums of files, a thread computes beside the training (hashing.py).
"""

import dataclasses
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dfactory.algorithms import Data
from dfactory.config.data import DatasetKeys
from dfactory.data.tables import commit_read
from dfactory.models.hub import resolve
from dfactory.recipe import Recipe
from dfactory.runs.folder import resolved_keys
from dfactory.runs.hashing import Hashes
from dfactory.runs.lineage import HELD_OUT, RANDOM, TRAINED_ON, Earlier, Lineage, Records, Training, read_lineage
from dfactory.runs.provenance import as_yaml, base_of, lineage_of, own_weights, source_of
from dfactory.versions import version_of

BY_T = re.compile(r"_t\d+\.\d+$")  # a metric at one mask ratio
PACKAGES = ("dfactory", "torch", "transformers", "deepspeed", "peft")

RowCounts = dict[str, list[int]]  # training or held out -> the rows of each entry, where they are known


@dataclasses.dataclass(frozen=True)
class Before:
    """Where a resumed run goes on: its checkpoint, and the recipe up to there if it was another one."""

    path: Path
    step: int
    other_recipe: str | None


class Account:
    """The lineage of a run in progress. Files are hashed from its making on, and from the start of the run on that is
    beside the training."""

    def __init__(self, recipe: Recipe, rows: RowCounts, world_size: int, before: Before | None = None):
        self._recipe, self._rows = recipe, rows
        model_dir = resolve(
            recipe.model_name_or_path, recipe.model_revision, weights=recipe.init_weights == "pretrained"
        )
        former = read_lineage(before.path) if before is not None else None
        mine = former.history[-1] if former is not None and former.history else None
        self._mine = mine if isinstance(mine, Training) else None
        self._origin = Lineage(former.base, former.history[:-1]) if self._mine else _origin(recipe, model_dir)
        self._source = self._mine.source if self._mine else source_of(model_dir)
        is_named = self._source.weights or self._source.revision or recipe.init_weights != "pretrained"
        self._weights = [] if is_named else own_weights(model_dir)
        self._seconds = (self._mine.seconds or 0.0) if self._mine else 0.0
        self._hardware = _hardware(recipe, world_size)
        self._before, self._first, self._last = before, {}, {}
        entries = [*recipe.datasets, *recipe.eval_datasets]
        files = [Path(entry.path) for entry in entries if entry.path is not None]
        self._hashes = Hashes([*self._weights, *files])

    def stepped(self, metrics: dict[str, float]) -> None:
        self._seconds += metrics["seconds"]

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        numbers = {name: float(value) for name, value in metrics.items() if not BY_T.search(name)}
        found = {"step": float(step), **numbers}
        self._first, self._last = self._first or found, found

    def text(self, step: int, tokens: int, last: bool) -> str:
        """The contents of dfactory.json for a checkpoint; the one of the last step waits for the sums."""
        if last:
            self._hashes.wait()
        mine = self._mine
        training = Training(
            stage=self._recipe.stage,
            run=Path(self._recipe.output_dir).resolve().name,
            source=dataclasses.replace(self._source, weights=self._source.weights or self._sums()),
            recipe=as_yaml(resolved_keys(self._recipe)),
            step=step,
            earlier_recipes=self._earlier_recipes(),
            tokens=tokens,
            seconds=round(self._seconds, 1),
            records=self._records(),
            versions=_versions(),
            hardware=list(dict.fromkeys([*(mine.hardware if mine else []), self._hardware])),
            first_evaluated=(mine.first_evaluated if mine else {}) or self._first,
            last_evaluated=self._last or (mine.last_evaluated if mine else {}),
        )
        return self._with_sums(self._origin).then(training).text()

    def _earlier_recipes(self) -> list[Earlier]:
        known = list(self._mine.earlier_recipes) if self._mine else []
        if self._before is not None and self._before.other_recipe:
            known.append(Earlier(self._before.step, as_yaml(yaml.safe_load(self._before.other_recipe))))
        return known

    def _sums(self) -> dict[str, str]:
        sums = {file.name: self._hashes.of(file).sha256 for file in self._weights}
        return {} if None in sums.values() else sums

    def _with_sums(self, origin: Lineage) -> Lineage:
        """The base's weights are those that the first run of a chain reads."""
        if origin.history or origin.base.weights or not self._weights:
            return origin
        return dataclasses.replace(origin, base=dataclasses.replace(origin.base, weights=self._sums()))

    def _records(self) -> list[Records]:
        uses = ((TRAINED_ON, self._recipe.datasets), (HELD_OUT, self._recipe.eval_datasets))
        return [self._of(use, entry, index) for use, entries in uses for index, entry in enumerate(entries)]

    def _of(self, use: str, entry: DatasetKeys, index: int) -> Records:
        rows = self._rows.get(use)
        if entry.path is None:
            found = {"note": "on the hub", "revision": commit_read(entry) or entry.revision}
            found |= {"on_hub": True, "config": entry.config, "split": entry.split}
            return Records(entry.name, use, entry.weight, rows[index] if rows else None, **found)
        hashed = self._hashes.of(Path(entry.path))
        lines = hashed.lines if entry.path.endswith(".jsonl") else None
        count = rows[index] if rows else lines
        return Records(Path(entry.path).name, use, entry.weight, count, hashed.sha256, hashed.note)


def rows_of_files(examples: Any) -> list[int]:
    """The rows that each file gave to Examples, or to streamed ones."""
    return np.bincount(examples.file_index_U, minlength=len(examples.report.files)).tolist()


def _origin(recipe: Recipe, model_dir: Path) -> Lineage:
    if recipe.init_weights == "pretrained":
        return lineage_of(model_dir)
    return Lineage(dataclasses.replace(base_of(model_dir), kind=RANDOM))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = version_of(package)
    return found


def _hardware(recipe: Recipe, world_size: int) -> str:
    """In generic words: kinds and numbers, no names of machines."""
    if torch.cuda.is_available():
        kind = f"{world_size} x {torch.cuda.get_device_name()}"
    else:
        kind = f"{world_size} process(es) of {torch.get_num_threads()} thread(s) on a CPU ({platform.machine()})"
    if recipe.algorithm.data is not Data.PROMPTS:
        return kind
    return f"{kind}, {recipe.num_rollout_workers} rollout worker(s) beside"
