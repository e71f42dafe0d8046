"""How a recipe key is declared: a default, a meaning, and the values that it may take."""

import dataclasses
from typing import Any

from omegaconf import MISSING


def key(
    default: Any, meaning: str, *, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None
):
    """A dataclass field for one recipe key. `low` and `high` are inclusive bounds; MISSING makes the key required; a
    dataclass as default is a group of further keys, `name.key`."""
    metadata = {"help": meaning, "choices": choices, "low": low, "high": high}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


REQUIRED = MISSING
