"""`dfactory schema`: every key of a recipe and of the decoder, as config/ declares them."""

import dataclasses
import typing
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.markup import escape

from dfactory.config.data import DatasetKeys
from dfactory.config.load import known_keys
from dfactory.config.merge import MergeKeys
from dfactory.config.recipe import Recipe

SECTIONS = {
    "recipe; generate and eval take its decode.* keys": (Recipe, ""),
    "each entry of datasets and eval_datasets": (DatasetKeys, ""),
    "export --merge": (MergeKeys, ""),
}


def schema() -> int:
    console = Console(highlight=False, soft_wrap=True)
    for title, (keys, prefix) in SECTIONS.items():
        console.print(f"[bold]{title}[/bold]")
        for name, field in known_keys(keys, prefix).items():
            if dataclasses.is_dataclass(field.type):
                continue  # a group: its keys follow
            console.print(escape(f"  {name}: {_type(field.type)} = {_default(field)}"))
            console.print(escape(f"      {_meaning(field)}"))
    return 0


def _type(annotation: Any) -> str:
    """`Optional[int]` reads `int or null`."""
    if typing.get_origin(annotation) is typing.Union:
        return f"{_type(typing.get_args(annotation)[0])} or null"
    if annotation is Any:
        return "any"
    return (
        annotation.__name__
        if typing.get_origin(annotation) is None
        else str(annotation).replace("dfactory.config.data.", "")
    )


def _default(field: dataclasses.Field) -> str:
    if field.default is MISSING or field.default == MISSING:
        return "required"
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _meaning(field: dataclasses.Field) -> str:
    rules = field.metadata
    parts = [rules["help"]]
    if rules["choices"]:
        parts.append(f"one of {', '.join(rules['choices'])}")
    bounds = [f"{sign} {rules[side]:g}" for side, sign in (("low", ">="), ("high", "<=")) if rules[side] is not None]
    return "; ".join([*parts, *bounds])
