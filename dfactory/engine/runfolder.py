"""The run folder: what `dfactory train` writes, and where.

output_dir/config.yaml      the recipe as it was resolved, without secrets
output_dir/metrics.jsonl    one object a step, and one an evaluation ("eval/...")
output_dir/previews.jsonl   held-out prompts as the model answered them at each evaluation, where prompts are decoded
output_dir/checkpoint-N/    a model directory that transformers loads, with the engine's state in engine/
output_dir/LATEST           the newest whole checkpoint's name; written last
output_dir/nonfinite/       step-N-rank-R.json: where a NaN or Inf came from, if there was one
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dfactory.config.recipe import Recipe
from dfactory.errors import CheckpointError, ConfigError, DataError
from dfactory.redaction import redacted

STATE = "engine/state.json"  # written last into a checkpoint: one without it is not whole


class RunFolder:
    """One rank, the first, writes; the others only read paths."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir)
        self.metrics_file = self.path / "metrics.jsonl"
        self.previews_file = self.path / "previews.jsonl"
        self.nonfinite = self.path / "nonfinite"

    def start(self, recipe: Recipe, resume_step: int | None) -> None:
        """Create the folder. Lines of steps behind the resumed one are dropped, so that none appears twice."""
        self.path.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            for old in self.checkpoints():
                shutil.rmtree(old)
            (self.path / "LATEST").unlink(missing_ok=True)
            for old in self.nonfinite.glob("step-*-rank-*.json"):
                old.unlink()
        replace_text(
            self.path / "config.yaml", OmegaConf.to_yaml(redacted(OmegaConf.to_container(OmegaConf.structured(recipe))))
        )
        for file in (self.metrics_file, self.previews_file):
            kept = []
            if resume_step is not None and file.is_file():
                lines = file.read_text().splitlines()
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resume_step]
            if kept or file.is_file() or file == self.metrics_file:
                replace_text(file, "".join(f"{line}\n" for line in kept))

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """A NaN or Inf, which JSON does not know, is written as null."""
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in metrics.items()}
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def append_previews(self, previews: list[dict[str, Any]]) -> None:
        with self.previews_file.open("a") as file:
            file.writelines(json.dumps(preview) + "\n" for preview in previews)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl. Raises DataError where it is missing, empty or broken."""
        file = self.metrics_file
        if not file.is_file():
            raise DataError(f"{file} does not exist: give run folders, the output_dir of a recipe that was trained")
        rows, lines = [], file.read_text().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as problem:
                if number == len(lines):
                    break  # a run that is being written, or was killed while it wrote
                raise DataError(f"{file}:{number} is not JSON ({problem.msg}): remove the line") from problem
        if not rows:
            raise DataError(f"{file} holds no step yet: wait for the first one")
        return rows

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [path.parent.parent for path in self.path.glob(f"checkpoint-*/{STATE}")]
        return sorted(found, key=step_of)

    def publish(self, partial: Path, step: int, keep: int | None) -> Path:
        """Turn a finished partial directory into checkpoint-N, point LATEST to it, and remove the oldest ones."""
        final = self.checkpoint(step)
        if final.exists():
            shutil.rmtree(final)
        sync_tree(partial)
        partial.rename(final)
        _sync(self.path)
        replace_text(self.path / "LATEST", final.name + "\n")
        if keep is not None:
            for old in self.checkpoints()[:-keep]:
                shutil.rmtree(old)
        return final

    def find_resume(self, wanted: Any, overwrite: bool) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` asks for; None to start anew.

        Raises CheckpointError if there is no such checkpoint, and ConfigError if a new run would mix its checkpoints with
        those of another.
        """
        if wanted is None or wanted is False:
            self._refuse_mixing_runs(overwrite)
            return None
        if wanted is True:
            whole = self.checkpoints()
            if not whole:
                raise CheckpointError(
                    f"resume_from_checkpoint true, but {self.path} holds no whole checkpoint-N: "
                    "check output_dir, or set resume_from_checkpoint=false to start anew"
                )
            return whole[-1]
        path = Path(str(wanted))
        if not (path / STATE).is_file():
            raise CheckpointError(f"resume_from_checkpoint {path} is not a whole checkpoint: it holds no {STATE}")
        return path

    def _refuse_mixing_runs(self, overwrite: bool) -> None:
        if not overwrite and (old := self.checkpoints()):
            raise ConfigError(
                f"output_dir {self.path} holds {old[-1].name} of an earlier run: set resume_from_checkpoint=true to go on, "
                "overwrite_output_dir=true to remove it and start anew, or another output_dir"
            )


def step_of(checkpoint: Path) -> int:
    """The optimiser step of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
