"""The runs of a chain in the order of their lineage: each starts from a checkpoint, or an export, of the one before.

Folders are followed by `model_name_or_path` of each run's config.yaml. Stages whose folders are not found, such as those
before an export, are known by their entries in dfactory.json.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import yaml

from dfactory.commands.reporting.runs import Run, labels, read_run
from dfactory.models.tiny import TINY_NAME
from dfactory.redaction import shareable
from dfactory.runs.folder import CONFIG, METRICS, RunFolder, run_of
from dfactory.runs.lineage import Base, Lineage, Training, read_lineage


class Link(NamedTuple):
    """A run of a chain, and what it started from."""

    run: Run
    source: str  # as people call it
    parent: Path | None  # the run folder that the source belongs to


class Chain(NamedTuple):
    links: list[Link]  # ancestors first
    earlier: list[Training]  # stages before them without a folder, oldest first
    base: Base | None  # of the first stage; None where no checkpoint says

    @property
    def is_a_line(self) -> bool:
        """Whether each run starts from the one before it; else two start from the same."""
        pairs = itertools.pairwise(self.links)
        return all(
            later.parent is not None and later.parent.resolve() == before.run.path.resolve() for before, later in pairs
        )


def read_chain(run_dirs: list[Path]) -> Chain:
    """The runs with their ancestors. Raises DataError where metrics.jsonl of one is missing, empty or broken."""
    parents: dict[Path, Path | None] = {}
    waiting = list(run_dirs)
    while waiting:
        run = waiting.pop()
        if run.resolve() not in {known.resolve() for known in parents}:
            source = _model_dir(run)
            parents[run] = None if source is None else _folder_of(source)
            waiting += [parents[run]] if parents[run] is not None else []
    order = sorted(parents, key=lambda run: _depth(run, parents))
    runs = [read_run(path, label) for path, label in zip(order, labels(order), strict=True)]
    links = [Link(run, _source_name(run.path), parents[run.path]) for run in runs]
    first = _lineage(order[0])
    return Chain(links, first.trainings[:-1] if first is not None else [], first.base if first is not None else None)


def _depth(run: Path, parents: dict[Path, Path | None]) -> int:
    """How many runs come before."""
    same = {path.resolve(): path for path in parents}
    seen, depth = set(), 0
    while (parent := parents[same[run.resolve()]]) is not None and parent.resolve() not in seen:
        seen.add(parent.resolve())
        run, depth = parent, depth + 1
    return depth


def _named_model(run: Path) -> str:
    config = run / CONFIG
    keys = yaml.safe_load(config.read_text()) if config.is_file() else None
    return str(keys.get("model_name_or_path", "")) if isinstance(keys, dict) else ""


def _model_dir(run: Path) -> Path | None:
    """The directory that a run started from. A relative one was the caller's, who is sought above the run folder."""
    named = Path(_named_model(run))
    if str(named) in ("", ".", TINY_NAME):
        return None
    places = [named] if named.is_absolute() else [named, *(above / named for above in run.resolve().parents)]
    return next((place for place in places if place.is_dir()), None)


def _folder_of(model_dir: Path) -> Path | None:
    """The run folder that a model directory is, or is a checkpoint of."""
    return model_dir if (model_dir / METRICS).is_file() else run_of(model_dir)


def _source_name(run: Path) -> str:
    model_dir = _model_dir(run)
    if model_dir is None or _folder_of(model_dir) is None:
        return str(shareable(_named_model(run)))
    folder = _folder_of(model_dir).resolve().name
    return folder if model_dir.resolve().name == folder else f"{folder}/{model_dir.name}"


def _lineage(run: Path) -> Lineage | None:
    """Of the newest checkpoint of a run."""
    checkpoints = RunFolder(run).checkpoints()
    return read_lineage(checkpoints[-1]) if checkpoints else None
