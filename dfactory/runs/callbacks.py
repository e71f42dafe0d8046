"""Code of one's own beside the training: objects with three hooks, which the recipe's `callbacks` names.

    callbacks: [mine.py:Stopwatch, {name: my_package.Notifier, channel: runs}]

    class Stopwatch(Callback):                          # from dfactory.runs.callbacks import Callback
        def __init__(self, recipe): ...
        def on_step(self, step, metrics): ...

A name is a file beside the recipe with a class in it, or a dotted path; further entries of a mapping are options. What is
named is called with the recipe and the options when the run starts, on the first rank alone, and its hooks are called
there after what they tell of is written. They see plain numbers and paths; an exception ends the run.
"""

import importlib.util
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from dfactory.errors import ConfigError
from dfactory.recipe import Recipe


class Callback(Protocol):
    """What a run tells of itself. Inherit it and write the hooks that you need."""

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """After an optimiser step, counted from 1, with its line of metrics.jsonl."""

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """After an evaluation, with its metrics without `eval/`."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """After a checkpoint is whole."""


def load_callbacks(recipe: Recipe) -> list[Callback]:
    """Import and make what the recipe names. Raises ConfigError for what cannot be found or lacks a hook."""
    return [_made(entry, recipe) for entry in recipe.callbacks]


def _made(entry: Any, recipe: Recipe) -> Callback:
    options = dict(entry) if isinstance(entry, dict) else {"name": entry}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"callbacks: name {name!r} is not text: give file.py:Class or package.module.Class")
    found = _find(name)
    if not callable(found):
        raise ConfigError(f"callback {name} is a {type(found).__name__}: name a class, or a function that makes one")
    callback = found(recipe, **options)
    if missing := _missing(callback):
        raise ConfigError(
            f"callback {name} has no {', '.join(missing)}: inherit dfactory.runs.callbacks.Callback, whose hooks do nothing"
        )
    return callback


def _missing(callback: Any) -> Iterable[str]:
    return [hook for hook in ("on_step", "on_evaluate", "on_save") if not callable(getattr(callback, hook, None))]


def _find(name: str) -> Callable[..., Any]:
    path, is_file, attribute = name.rpartition(":")
    try:
        return getattr(_module(Path(path)), attribute) if is_file else pkgutil.resolve_name(name)
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as problem:
        raise ConfigError(
            f"callback {name}: {problem}: give file.py:Class, relative to the recipe, or package.module.Class"
        ) from problem


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"dfactory_callback_{file.stem}", file)
    if spec is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
