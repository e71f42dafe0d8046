"""Trackers: services that get a run's metrics besides metrics.jsonl, where the recipe's `report_to` names them.

accelerate has a class for each. The table below says with which options one starts a run in a project, and continues it
after each resume. Where a service takes the run's id from us, it is made up; otherwise it is asked for it. Either way it is
kept in the run folder, as NAME-id. `tracker_options` of the recipe adds to these options and overrides them.

Services that copy what a program prints are told not to: they would do so before `redaction` sees it.
"""

import contextlib
import dataclasses
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dfactory.config.training import TRACKERS
from dfactory.errors import ConfigError
from dfactory.recipe import Recipe
from dfactory.redaction import redact
from dfactory.runs.folder import RunFolder, replace_text, resolved_keys, writing


@dataclasses.dataclass(frozen=True)
class Start:
    """What a tracker is started with."""

    project: str
    name: str  # of the run
    id: str | None  # of the run, the same after each resume; None where the service has still to give one
    path: Path  # the run folder
    step: int  # the last step that is done


@dataclasses.dataclass(frozen=True)
class Service:
    """How one tracker is started: keyword arguments of accelerate's class."""

    options: Callable[[Start], dict[str, Any]]
    project_first: bool = True  # whether the class takes the project before its options
    id_length: int = 0  # of an id that the service takes; 0: it gives one
    given_id: Callable[[Any], str | None] = lambda run: None  # asked of the service's own run


SERVICES = {
    "tensorboard": Service(
        lambda s: {"run_name": "tensorboard", "logging_dir": s.path, "purge_step": s.step + 1}, project_first=False
    ),
    "wandb": Service(
        lambda s: {"id": s.id, "name": s.name, "dir": str(s.path), "resume": "allow", "settings": {"console": "off"}},
        id_length=8,
    ),
    "trackio": Service(lambda s: {"name": f"{s.name}-{s.id}", "resume": "allow", "embed": False}, id_length=8),
    "mlflow": Service(lambda s: {"run_id": s.id, "run_name": s.name}, given_id=lambda run: run.info.run_id),
    "swanlab": Service(
        lambda s: {
            "id": s.id,
            "name": s.name,
            "log_dir": str(s.path / "swanlab"),
            "resume": "allow",
            "settings": {"terminal": {"proxy_type": "none"}},
        },
        id_length=21,
    ),
    "comet_ml": Service(
        lambda s: {
            "experiment_key": s.id,
            "experiment_config": importlib.import_module("comet_ml").ExperimentConfig(
                name=s.name, auto_output_logging=False, log_env_details=False
            ),
        },
        id_length=32,
    ),
    "aim": Service(
        lambda s: {
            "run_name": s.name,
            "logging_dir": str(s.path),
            "run_hash": s.id,
            "experiment": s.project,
            "capture_terminal_logs": False,
        },
        project_first=False,
        given_id=lambda run: run.hash,
    ),
    "clearml": Service(
        lambda s: {
            "project_name": s.project,
            "task_name": s.name,
            "continue_last_task": s.id or False,
            "auto_connect_streams": False,
        },
        given_id=lambda run: run.id,
    ),
    "dvclive": Service(
        lambda s: {"dir": str(s.path / "dvclive"), "resume": s.step > 0, "save_dvc_exp": False, "dvcyaml": None},
        project_first=False,
    ),
}


class Trackers:
    """The trackers that a recipe asks for, started. Used on the first rank only."""

    def __init__(self, recipe: Recipe, folder: RunFolder, step: int):
        self.started: list[GeneralTracker] = []
        if not recipe.report_to:
            return
        sys.argv[1:] = map(redact, sys.argv[1:])  # some send the command line along
        _start_state()
        for name in recipe.report_to:
            self.started.append(_started(name, recipe, folder, step))

    def log(self, metrics: dict[str, Any]) -> None:
        for tracker in self.started:
            tracker.log(metrics, step=metrics["step"])

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Send a table to those that show one."""
        columns, data = list(rows[0]), [[str(value) for value in row.values()] for row in rows]
        for tracker in self.started:
            if hasattr(tracker, "log_table"):
                tracker.log_table(name, columns, data, step=step)
            elif tracker.name == "tensorboard":
                tracker.log({name: _markdown(columns, data)}, step=step)

    def finish(self) -> None:
        for tracker in self.started:
            tracker.finish()


def check_trackers(recipe: Recipe) -> None:
    """Raise ConfigError for a tracker whose package is not installed, before anything is started."""
    for name in recipe.report_to:
        if find_spec(name) is None:
            raise ConfigError(f"report_to {name}: its package is not installed: run `pip install {TRACKERS[name]}`")


def _started(name: str, recipe: Recipe, folder: RunFolder, step: int) -> GeneralTracker:
    service, file = SERVICES[name], folder.tracker_file(name)
    known = file.read_text().strip() if file.is_file() else None
    if known is None and service.id_length:
        known = _keep(file, secrets.token_hex(service.id_length)[: service.id_length])
    start = Start(recipe.project, redact(recipe.run_name or folder.path.name), known, folder.path, step)
    options = service.options(start) | recipe.tracker_options.get(name, {})
    tracker = LOGGER_TYPE_TO_CLASS[name](*[start.project][: service.project_first], **options)
    tracker.start()
    if known is None and (given := service.given_id(tracker.tracker)):
        _keep(file, given)
    tracker.store_init_configuration(_plain(resolved_keys(recipe)))
    return tracker


def _keep(file: Path, text: str) -> str:
    with writing(file):
        replace_text(file, text + "\n")
    return text


def _plain(keys: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe as accelerate wants it: flat, with numbers, texts and truth values."""
    flat = {}
    for name, value in keys.items():
        if isinstance(value, dict) and value:
            flat |= _plain(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def _markdown(columns: list[str], data: list[list[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *data]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    )


def _start_state() -> None:
    """accelerate's loggers want its state. Making it joins no group, but changes the environment and the threads. A process
    that is in no group is taken to be alone, whatever its environment says of ranks."""
    with _unchanged():
        if not torch.distributed.is_initialized():
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
        PartialState(cpu=not torch.cuda.is_available())


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    torch.set_num_threads(threads)
