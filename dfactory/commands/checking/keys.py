"""Section `keys`: what every key is, and who says so."""

import dataclasses
from typing import Any

from rich.text import Text

from dfactory.algorithms import ALGORITHMS
from dfactory.commands.checking.page import Page, named
from dfactory.config.load import COMMAND_LINE, known_keys
from dfactory.config.owners import owners_of
from dfactory.decoding.rules.base import RULES
from dfactory.recipe import Loaded, Recipe
from dfactory.redaction import redacted


def tell_keys(page: Page, loaded: Loaded) -> None:
    """Keys that the recipe or the command line gives, a line each; then those that have their default, in one paragraph."""
    earlier = {
        key: alias.old for alias in loaded.aliases for key in (part.split(" = ")[0] for part in alias.new.split(", "))
    }
    given: list[tuple[str, Text]] = []
    defaults = []
    for name, field in known_keys(Recipe).items():
        if dataclasses.is_dataclass(field.type) or not applies(loaded.recipe, name):
            continue
        text = _text(redacted(_value(loaded.recipe, name)))
        if name not in loaded.origins:
            defaults.append(f"{name} {text}")
            continue
        origin = "command line" if loaded.origins[name] == COMMAND_LINE else "recipe"
        if name in earlier:
            origin += f", {earlier[name].split(' = ')[0] or 'as the earlier code has it'}"
        given.append((name, Text.assemble(text, (f"  ({origin})", "dim"))))
    width = 2 + max((len(name) for name, _ in given), default=0)
    for index, (name, text) in enumerate(given):
        page.hang(Text.assemble(named("" if index else "given"), name.ljust(width)), text)
    page.hang(named("default"), Text(", ".join(defaults), "dim"))


def applies(recipe: Recipe, name: str) -> bool:
    """Whether a key is one of the recipe's algorithm or decoding rule, or of all."""
    group, _, bare = name.rpartition(".")
    if group == "decode":
        owners, selected = owners_of(bare, RULES), RULES[recipe.decode.rule]
    else:
        owners, selected = owners_of(bare, ALGORITHMS), recipe.algorithm
    return not owners or selected in owners


def _value(recipe: Recipe, dotted: str) -> Any:
    value: Any = recipe
    for name in dotted.split("."):
        value = vars(value)[name]
    return value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if dataclasses.is_dataclass(value):
        return _text(vars(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_text(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
