"""Weights that a run leaves as they are, by patterns of their names."""

import re
from collections.abc import Iterable

from torch import nn

from dfactory.errors import ConfigError


def freeze(model: nn.Module, patterns: Iterable[str]) -> int:
    """Take the parameters whose name one of the regular expressions finds out of training. Returns how many numbers stay
    in training. Raises ConfigError for a pattern that finds none, and if nothing is left."""
    named = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in named if re.search(pattern, name)]
        if not found:
            raise ConfigError(
                f"frozen_parameters {pattern!r} finds no parameter: the model has names such as {', '.join(_some(named))}"
            )
        for name in found:
            named[name].requires_grad_(False)
    left = [p for p in named.values() if p.requires_grad]
    if not left:
        raise ConfigError(f"frozen_parameters {list(patterns)} find every parameter: nothing is left to train")
    return sum(getattr(p, "ds_numel", p.numel()) for p in left)


def _some(named: dict[str, nn.Parameter]) -> list[str]:
    names = list(named)
    return [names[0], names[len(names) // 2], names[-1]]
