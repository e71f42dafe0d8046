"""What `dfactory eval` measured of a run's checkpoints: evaluations.jsonl in the run folder, a line each.

A line names the step of the checkpoint, the command and the date, so that the card of an export and the report of a
chain can quote it. A run that starts again from an earlier step drops the lines of later ones, as of all tables by step.
"""

import dataclasses
import json
from pathlib import Path

from dfactory.errors import DataError
from dfactory.models.hub import resolve
from dfactory.runs.folder import EVALUATIONS, append_text, json_lines, run_of, step_of
from dfactory.runs.lineage import Evaluation, from_json


def checkpoint_of(model: str) -> Path | None:
    """The checkpoint that a command line names, itself or as its run folder; None for any other model."""
    if not Path(model).is_dir():
        return None
    model_dir = resolve(model)
    return model_dir if run_of(model_dir) is not None else None


def record(checkpoint: Path, evaluation: Evaluation) -> Path:
    """Append what was measured of a checkpoint to its run folder. Returns the file. Raises CheckpointError where the folder
    cannot be written."""
    file = run_of(checkpoint) / EVALUATIONS
    evaluation = dataclasses.replace(evaluation, step=step_of(checkpoint))
    append_text(file, json.dumps(dataclasses.asdict(evaluation), ensure_ascii=False) + "\n")
    return file


def evaluations_of(run: Path) -> list[Evaluation]:
    """All that is recorded, oldest first; of a command that was called again the last. Raises DataError for a bad line."""
    file, found = run / EVALUATIONS, {}
    for number, row in json_lines(file) if file.is_file() else ():
        try:
            one = from_json(Evaluation, row, "the line")
        except TypeError as problem:
            raise DataError(f"{file}:{number} is no evaluation ({problem}): remove the line") from problem
        found.pop((one.step, one.command), None)
        found[one.step, one.command] = one
    return list(found.values())


def evaluations_at(run: Path, step: int) -> list[Evaluation]:
    return [one for one in evaluations_of(run) if one.step == step]
