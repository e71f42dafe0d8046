"""The run folder: what `dfactory train` writes, and where.

output_dir/config.yaml      the recipe as it was resolved, without secrets
output_dir/config.until-step-N.yaml   the one that ran up to step N, where a resumed run changed keys there
output_dir/metrics.jsonl    one object a step, and one an evaluation ("eval/...")
output_dir/previews.jsonl   held-out prompts as the model answered them at each evaluation, where prompts are decoded
output_dir/completions.jsonl   rollouts with their rewards, in reinforcement learning
output_dir/evaluations.jsonl   what `dfactory eval` measured of its checkpoints
output_dir/groups.jsonl     which prompts each of its steps met and trained on, by number
output_dir/checkpoint-N/    a model directory that transformers loads, with the engine's state in engine/
output_dir/LATEST           the newest whole checkpoint's name; written last
output_dir/BEST             with load_best_model_at_end, once the run has ended: the best checkpoint's name
output_dir/NAME-id          of a tracker, such as wandb-id: its id of the run, the same after each resume
output_dir/nonfinite/       step-N-rank-R.json: where a NaN or Inf came from, if there was one
output_dir/profile/         a trace and memory of some steps (`profile_steps`; profiling.py)
output_dir/unused-checkpoint-N/   set aside: damaged, or later than the checkpoint that a run was resumed from
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from safetensors import SafetensorError

from dfactory import faults
from dfactory.config.training import TRACKERS
from dfactory.errors import CheckpointError, ConfigError, DataError
from dfactory.recipe import Recipe
from dfactory.redaction import redacted

STATE = "engine/state.json"
RECIPE = "engine/recipe.yaml"  # of a checkpoint: the recipe that it was trained by, as config.yaml has it
CONFIG = "config.yaml"
METRICS, PREVIEWS = "metrics.jsonl", "previews.jsonl"
EVALUATIONS = "evaluations.jsonl"
STEP_TABLES = (
    METRICS,
    PREVIEWS,
    EVALUATIONS,
    "completions.jsonl",
    "groups.jsonl",
)  # each line names its step, counted from 1

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container")  # in the message of torch.save when it could not write
_NAME = re.compile(r"checkpoint-\d+")


class Ranked(NamedTuple):
    """A checkpoint and what the run measured at its step."""

    path: Path
    value: float

    def __str__(self) -> str:
        return f"{self.path.name} ({self.value:.6g})"


class RunFolder:
    """A run folder. Only the first rank writes; the others use the paths."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir)
        self.metrics_file = self.path / METRICS
        self.previews_file = self.path / PREVIEWS
        self.latest_file = self.path / "LATEST"
        self.best_file = self.path / "BEST"
        self.nonfinite = self.path / "nonfinite"

    def start(self, recipe: Recipe, resume_step: int | None = None, before: str | None = None) -> list[Path]:
        """Create the folder. Files of steps after the resumed one are moved out of the way, so that no step appears
        twice: lines are dropped, checkpoints are set aside. Returns the new paths of those. `before` is the recipe that the
        run had up to the resumed step, where it was another one: it is kept."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for left in (*self.path.glob(".checkpoint-*.partial"), *self.path.glob(".checkpoint-*.removed")):
                shutil.rmtree(left)
            self.best_file.unlink(missing_ok=True)
            faults.at("leftovers.removed")
            aside = self._start_fresh() if resume_step is None else self._set_aside(resume_step)
            self._keep_history(resume_step, before)
            replace_text(self.path / CONFIG, recipe_text(recipe))
            for file in (self.path / name for name in STEP_TABLES):
                kept = _lines_up_to(file, resume_step) if resume_step is not None else []
                if kept or file.is_file() or file == self.metrics_file:
                    replace_text(file, "".join(f"{line}\n" for line in kept))
            return aside

    def _keep_history(self, step: int | None, before: str | None) -> None:
        """Recipes of steps that are taken out of the way go with them."""
        for old in self.path.glob("config.until-step-*.yaml"):
            if step is None or int(old.name.split("-")[2].removesuffix(".yaml")) > step:
                old.unlink()
        if before is not None:
            replace_text(self.path / f"config.until-step-{step}.yaml", before)

    def _start_fresh(self) -> list[Path]:
        self.latest_file.unlink(missing_ok=True)
        for name in TRACKERS:
            self.tracker_file(name).unlink(missing_ok=True)
        for old in self._named():
            self._remove(old)
        for old in self.nonfinite.glob("step-*-rank-*.json"):
            old.unlink()
        return []

    def _set_aside(self, step: int) -> list[Path]:
        """Rename the checkpoints of later steps; LATEST first, so that it never names one that is gone."""
        later = [path for path in self._named() if step_of(path) > step]
        staying = [path for path in self.checkpoints() if path not in later]
        if staying:
            replace_text(self.latest_file, staying[-1].name + "\n")
        else:
            self.latest_file.unlink(missing_ok=True)
        aside = []
        for path in later:
            target = path.with_name(f"unused-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            aside.append(path.rename(target))
            faults.at("unused.renamed")
        return aside

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a line. NaN and Inf, which JSON does not have, are written as null."""
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in metrics.items()}
        append_text(self.metrics_file, json.dumps(row, allow_nan=False) + "\n")

    def append_previews(self, previews: list[dict[str, Any]]) -> None:
        append_text(self.previews_file, "".join(json.dumps(preview) + "\n" for preview in previews))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl. Raises DataError where it is missing, empty or broken."""
        file = self.metrics_file
        if not file.is_file():
            raise DataError(f"{file} does not exist: give run folders, the output_dir of a recipe that was trained")
        rows = [row for _, row in json_lines(file)]
        if not rows:
            raise DataError(f"{file} holds no step yet: wait for the first one")
        return rows

    def tracker_file(self, name: str) -> Path:
        """Where a tracker's id of the run is kept."""
        return self.path / f"{name}-id"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first. Their manifests show whether they are still whole."""
        return [path for path in self._named() if (path / STATE).is_file()]

    def _named(self) -> list[Path]:
        found = [path for path in self.path.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def publish(self, partial: Path, step: int) -> Path:
        """Turn a finished partial directory into checkpoint-N, and point LATEST to it."""
        final = self.checkpoint(step)
        if final.exists():
            self._remove(final)
        sync_tree(partial)
        faults.at("checkpoint.synced")
        partial.rename(final)
        _sync(self.path)
        faults.at("checkpoint.renamed")
        replace_text(self.latest_file, final.name + "\n")
        return final

    def ranked_checkpoints(self, metric: str, smaller_is_better: bool) -> list[Ranked]:
        """The checkpoints with a finite value of a metric at their step, best first; the newer one first among equals."""
        values = {row["step"]: row[metric] for row in self.metrics() if row.get(metric) is not None}
        found = [(path, values.get(step_of(path))) for path in self.checkpoints()]
        ranked = [Ranked(path, value) for path, value in found if value is not None and math.isfinite(value)]
        sign = 1 if smaller_is_better else -1
        return sorted(ranked, key=lambda one: (sign * one.value, -step_of(one.path)))

    def name_best(self, metric: str, smaller_is_better: bool) -> Ranked | None:
        """Write BEST. Returns the checkpoint that it names; None if none has the metric at its step."""
        ranked = self.ranked_checkpoints(metric, smaller_is_better)
        if not ranked:
            return None
        replace_text(self.best_file, ranked[0].path.name + "\n")
        return ranked[0]

    def remove_old(self, keep: int | None, best_by: str | None = None, smaller_is_better: bool = True) -> None:
        """Remove checkpoints until `keep` are left, the oldest first, but never the newest and the best by a metric."""
        if keep is None or not (found := self.checkpoints()):
            return
        ranked = self.ranked_checkpoints(best_by, smaller_is_better) if best_by and self.metrics_file.is_file() else []
        stay = {found[-1], *(one.path for one in ranked[:1])}
        others = [path for path in found if path not in stay]
        for old in others[: max(len(others) - max(keep - len(stay), 0), 0)]:
            self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Remove a folder after renaming it, so that no reader sees it half removed."""
        doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        faults.at("old.removing", doomed)
        shutil.rmtree(doomed)
        faults.at("old.removed")

    def resume_candidates(self, wanted: Any, overwrite: bool) -> list[Path]:
        """The checkpoints that `resume_from_checkpoint` may mean, the best first; empty for a fresh start.

        Raises CheckpointError if there is no such checkpoint, and ConfigError if a new run would mix its checkpoints with
        those of another.
        """
        if wanted is None or wanted is False:
            self._refuse_mixing_runs(overwrite)
            return []
        if wanted is True:
            if not (named := self._named()):
                raise CheckpointError(self._nothing_whole(f"{self.path} holds no checkpoint-N"))
            return named[::-1]
        path = Path(str(wanted))
        if not (path / STATE).is_file():
            raise CheckpointError(f"resume_from_checkpoint {path} is not a whole checkpoint: it holds no {STATE}")
        return [path]

    def first_whole(
        self, candidates: list[Path], find_problems: Callable[[Path], list[str]]
    ) -> tuple[Path | None, list[str]]:
        """The first checkpoint without a problem, and a sentence on each one before it. Raises CheckpointError if every
        one is damaged."""
        damaged = []
        for path in candidates:
            if not (problems := find_problems(path)):
                return path, [f"{one}; it is not used, the run goes on from {path}" for one in damaged]
            damaged.append(f"{path} is damaged: {'; '.join(problems)}")
        if damaged:
            raise CheckpointError(self._nothing_whole("; ".join(damaged)))
        return None, []

    def _nothing_whole(self, why: str) -> str:
        return (
            f"resume_from_checkpoint finds no whole checkpoint: {why}; check output_dir {self.path}, or set "
            "resume_from_checkpoint=false and overwrite_output_dir=true to start again"
        )

    def _refuse_mixing_runs(self, overwrite: bool) -> None:
        if not overwrite and (old := self._named()):
            raise ConfigError(
                f"output_dir {self.path} holds {old[-1].name} of an earlier run: set resume_from_checkpoint=true to go on, "
                "overwrite_output_dir=true to remove it and start again, or another output_dir"
            )


def recipe_of(checkpoint: Path) -> Path | None:
    """The file with the recipe that a checkpoint was trained by. None: checkpoints of earlier versions hold no recipe."""
    return next((file for file in (checkpoint / RECIPE, checkpoint.parent / CONFIG) if file.is_file()), None)


def resolved_keys(recipe: Recipe) -> dict[str, Any]:
    """The text of a resolved recipe, without secrets."""
    return redacted(OmegaConf.to_container(OmegaConf.structured(recipe)))


def recipe_text(recipe: Recipe) -> str:
    return OmegaConf.to_yaml(resolved_keys(recipe))


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The values of a table with their line numbers, without an unfinished last line. Raises DataError for another one."""
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as problem:
            if number == len(lines):
                return  # a run that is being written, or was killed while it wrote
            raise DataError(f"{file}:{number} is not JSON ({problem.msg}): remove the line") from problem


def run_of(model_dir: Path) -> Path | None:
    """The run folder that a model directory is a checkpoint of; None for any other."""
    folder = model_dir.parent
    is_checkpoint = bool(_NAME.fullmatch(model_dir.name)) and (folder / METRICS).is_file()
    return folder if is_checkpoint else None


def step_of(checkpoint: Path) -> int:
    """The optimiser step of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def _lines_up_to(file: Path, step: int) -> list[str]:
    """The lines of steps up to `step`, without a last line that was cut when its writer ended."""
    kept = []
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line.decode())
    return kept


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """A context that turns the errors of a full or failing disk into a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and not any(word in str(problem) for word in _TORCH_SAVE):
            raise
        raise CheckpointError(
            f"{what} could not be written: {problem}; make room or repair the disk, then go on from the last whole "
            "checkpoint with resume_from_checkpoint=true"
        ) from problem


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part."""
    partial, encoded = file.with_name(file.name + ".partial"), text.encode()
    with partial.open("wb") as stream:
        stream.write(encoded)
        stream.flush()
        os.fsync(stream.fileno())
    faults.at(f"{file.name}.written", partial)
    _refuse_short(partial, len(encoded))
    partial.replace(file)
    faults.at(f"{file.name}.renamed")


def append_text(file: Path, text: str) -> None:
    """Append the text. Raises CheckpointError if not all of it was written."""
    encoded = text.encode()
    with writing(file):
        with file.open("ab") as stream:
            before = stream.tell()
            stream.write(encoded)
        faults.at(f"{file.name}.appended", file, before)
        _refuse_short(file, before + len(encoded))


def _refuse_short(file: Path, size: int) -> None:
    if (found := file.stat().st_size) != size:
        raise CheckpointError(f"{file} was cut short while it was written: {found:,} bytes of {size:,}")


def sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
