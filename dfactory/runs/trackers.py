"""Trackers: services that get a run's metrics besides metrics.jsonl, where the recipe's `report_to` names them."""

import secrets
import sys
from typing import Any

from dfactory.recipe import Recipe
from dfactory.redaction import redact
from dfactory.runs.folder import RunFolder, replace_text, resolved_keys, writing


class Wandb:
    """A run of Weights & Biases, the same one after each resume."""

    def __init__(self, recipe: Recipe, folder: RunFolder):
        import wandb

        sys.argv[1:] = map(redact, sys.argv[1:])  # wandb sends the command line along
        self.run = wandb.init(
            project="dfactory",
            id=_id_in(folder),
            name=redact(recipe.run_name or folder.path.name),
            config=resolved_keys(recipe),
            dir=str(folder.path),
            resume="allow",
            settings=wandb.Settings(console="off"),  # it would copy the output before `redaction` sees it
        )

    def log(self, metrics: dict[str, Any]) -> None:
        self.run.log(metrics, step=metrics["step"])

    def finish(self) -> None:
        self.run.finish()


def start_trackers(recipe: Recipe, folder: RunFolder) -> list[Wandb]:
    """The trackers that the recipe asks for, started."""
    return [Wandb(recipe, folder)] if "wandb" in recipe.report_to else []


def _id_in(folder: RunFolder) -> str:
    """Kept in the run folder, so that a resumed run continues under its own name."""
    file = folder.tracker_file
    if not file.is_file():
        with writing(file):
            replace_text(file, secrets.token_hex(4) + "\n")
    return file.read_text().strip()
