"""Reads run folders: metrics, recipe, sweeps of decode keys, completions."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from dfactory.algorithms.base import default_of
from dfactory.decoding.rules.base import default_rule
from dfactory.errors import DataError
from dfactory.redaction import redact
from dfactory.runs.folder import RunFolder

SWEEPS = ("thresholds*.jsonl", "sweep_*.jsonl")  # what `dfactory eval --thresholds` and `--sweep` write
COMPLETIONS = "completions.jsonl"

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


class Run(NamedTuple):
    """The contents of a run folder."""

    label: str
    path: Path
    rows: list[dict[str, Any]]  # metrics.jsonl
    config: str  # config.yaml, resolved

    @property
    def stage(self) -> str:
        return (yaml.safe_load(self.config) or {}).get("stage", default_of("stage"))

    def curve(self, metric: str) -> Curve:
        points = [(row["step"], row[metric]) for row in self.rows if metric in row]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, float), np.array(values, float)

    def sweeps(self) -> dict[str, list[dict[str, Any]]]:
        """Sweeps by name, each in the order of the values where these are numbers."""
        found = {}
        for file in sorted(file for pattern in SWEEPS for file in self.path.glob(pattern)):
            suffix = file.stem.removeprefix("thresholds").removeprefix("sweep_")
            rows = read_objects(file)
            if all(isinstance(swept_value(row), int | float) for row in rows):
                rows.sort(key=swept_value)
            found[f"{self.label} {suffix.strip('_-. ')}".strip()] = rows
        return found

    def completions(self) -> list[dict[str, Any]]:
        file = self.path / COMPLETIONS
        return read_objects(file) if file.is_file() else []


def sweep_file(key: str) -> str:
    """The name of the file in a run folder that has a sweep over a decode key."""
    return "thresholds.jsonl" if key == default_rule().dial() else f"sweep_{key}.jsonl"


def swept_key(row: dict[str, Any]) -> str:
    """The decode key that a line of a sweep has a value of; lines of thresholds do not name it."""
    return row.get("swept", default_rule().dial())


def swept_value(row: dict[str, Any]) -> Any:
    return row[swept_key(row)]


def read_run(path: Path, label: str) -> Run:
    rows = RunFolder(path).metrics()
    config = path / "config.yaml"
    return Run(label, path, rows, redact(config.read_text()) if config.is_file() else "")


def labels(run_dirs: list[Path]) -> list[str]:
    names = [path.resolve().name for path in run_dirs]
    return names if len(set(names)) == len(names) else [str(path) for path in run_dirs]


def read_objects(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without an unfinished last line. Raises DataError for other bad lines."""
    lines = file.read_text().splitlines()
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as problem:
            if number == len(lines):
                break
            raise DataError(f"{file}:{number} is not JSON ({problem.msg}): remove the line") from problem
    return objects
