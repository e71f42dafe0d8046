"""Giving a module of transformers a further way to run: its class gets a subclass, its weights and names stay."""

import functools

from torch import nn


def give(module: nn.Module, mode: type) -> None:
    """Let `module` be of `mode` too, whose methods come before its own. Once is enough."""
    if not isinstance(module, mode):
        module.__class__ = _joined(mode, type(module))


@functools.cache
def _joined(mode: type, family: type) -> type:
    """One class for all modules of a class; `family` is what it was."""
    return type(family.__name__, (mode, family), {"family": family, "__module__": mode.__module__})
