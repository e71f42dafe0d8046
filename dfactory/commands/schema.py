"""`dfactory schema`: every key of a recipe and of the decoder, as config/ declares them; and the keys of the earlier one."""

import dataclasses
import inspect
import typing
from typing import Any

from omegaconf import MISSING
from rich.table import Table

from dfactory.algorithms import ALGORITHMS
from dfactory.config.data import DatasetKeys
from dfactory.config.earlier import Alias
from dfactory.config.earlier_keys import CONVERTED, IMPLIED, LEFT_OUT, ONLY, RENAMED
from dfactory.config.load import known_keys
from dfactory.config.merge import MergeKeys
from dfactory.config.owners import either, key_names, owners_of
from dfactory.config.resume import resume_table
from dfactory.console import plain_console
from dfactory.decoding.rules.base import RULES
from dfactory.recipe import AlgorithmKeys, Recipe
from dfactory.redaction import redact

SECTIONS = {
    "recipe; generate and eval take its decode.* keys": (Recipe, ""),
    "each entry of datasets and eval_datasets": (DatasetKeys, ""),
    "export --merge": (MergeKeys, ""),
}


def schema(markdown: bool) -> int:
    if markdown:
        print(key_page())
        return 0
    console = plain_console(soft_wrap=True)
    for title, (keys, prefix) in SECTIONS.items():
        console.print(title, style="bold")
        for name, field in known_keys(keys, prefix).items():
            if dataclasses.is_dataclass(field.type):
                continue  # a group: its keys follow
            console.print(f"  {name}: {_type(field.type)} = {_default(field)}")
            console.print(f"      {_meaning(field, _owner(name))}")
    return 0


KEY_PAGE = """# Keys

Every key of a recipe, of `datasets` entries, of the decoder (`decode.*`) and of `export --merge`. This page is what
`dfactory schema --markdown` prints, and a test keeps it so. On the command line `key=value`, `--key value` and
`--key=value` say the same. An unknown key ends with status 2 and the nearest name.
"""


def key_page() -> str:
    """recipes/KEYS.md: all keys as tables in Markdown."""
    lines = [KEY_PAGE]
    for title, (keys, prefix) in SECTIONS.items():
        lines += [f"## {title[0].upper()}{title[1:]}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in known_keys(keys, prefix).items():
            if not dataclasses.is_dataclass(field.type):
                cells = (f"`{name}`", _type(field.type), f"`{_default(field)}`", _meaning(field, _owner(name)))
                lines.append(_row(cells))
        lines.append("")
    return "\n".join(lines).rstrip()


def earlier() -> int:
    print(earlier_table())
    return 0


def resuming() -> int:
    print(resume_table([field.name for field in dataclasses.fields(AlgorithmKeys)]))
    return 0


def rules() -> int:
    print(rule_table())
    return 0


def rule_table() -> str:
    """The decoding rules with their keys, as a table in Markdown."""
    lines = ["| `decode.rule` | commits | reads | keys |", "|---|---|---|---|"]
    for rule in RULES:
        first = inspect.cleandoc(rule.__doc__).partition("\n")[0]
        keys = ", ".join(f"`{field.name}`" for field in dataclasses.fields(rule))
        lines.append(_row((f"`{rule.name}`", first, ", ".join(column.name for column in rule.reads), keys)))
    return "\n".join(lines)


def algorithms() -> int:
    print(algorithm_table())
    return 0


def algorithm_table() -> str:
    """The algorithms with their keys, as a table in Markdown. Keys that all with one wide selector have are left out."""
    lines = ["| selected by | what it does | learns from | keys of its own | source |", "|---|---|---|---|---|"]
    for algorithm in sorted(ALGORITHMS, key=lambda algorithm: (algorithm.wide_selector, algorithm.name)):
        selected = ", ".join(f"`{key}: {value}`" for key, value in algorithm.selects.items())
        alike = [other for other in ALGORITHMS if other.wide_selector == algorithm.wide_selector]
        shared = set.intersection(*map(key_names, alike)) if len(alike) > 1 else set()
        keys = [field.name for field in dataclasses.fields(algorithm.Keys) if field.name not in shared]
        cells = (selected, algorithm.summary, algorithm.data.value, ", ".join(f"`{key}`" for key in keys))
        lines.append(_row((*cells, _cited(algorithm.source))))
    return "\n".join(lines)


def _cited(source: str) -> str:
    """A section of docs/ as a link within it; a paper as it is."""
    page, _, anchor = source.removeprefix("docs/").partition("#")
    return f"[{anchor}]({page}#{anchor})" if anchor else source


def earlier_table() -> str:
    """What becomes of each key of the earlier dFactory, as a table in Markdown."""
    rows = [(f"`{old}`", f"`{new}`") for old, new in RENAMED.items()]
    rows += [(f"`{old}`", what) for old, what in CONVERTED.items()]
    rows += [
        (f"`{old}`", f"{' or '.join(map(_yaml, only.values))} is so here; else refused: {only.otherwise}")
        for old, only in ONLY.items()
    ]
    rows += [(f"`{old}`", f"left out: {why}") for old, why in LEFT_OUT.items()]
    rows += [("(not in the recipe)", f"`{new}: {_yaml(value)}`: {why}") for new, (value, why) in IMPLIED.items()]
    return "\n".join(["| earlier key | here |", "|---|---|", *map(_row, rows)])


def show_aliases(aliases: list[Alias]) -> None:
    """To standard error, so that what a command prints stays what it is."""
    console = plain_console(stderr=True)
    table = Table(
        "earlier key", "here", "note", title="a recipe of the earlier dFactory", title_justify="left", box=None
    )
    for alias in aliases:
        table.add_row(redact(alias.old or "(not given)"), redact(alias.new), redact(alias.note))
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _yaml(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


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
    return _yaml(value)


def _owner(name: str) -> str:
    """Which algorithms, or decoding rules, a key belongs to; empty for one that all have."""
    group, _, bare = name.rpartition(".")
    entries = RULES if group == "decode" else ALGORITHMS
    return either(owners_of(bare, entries), entries)


def _meaning(field: dataclasses.Field, owner: str = "") -> str:
    rules = field.metadata
    parts = [f"{owner}: {rules['help']}" if owner else rules["help"]]
    if rules["choices"]:
        parts.append(f"one of {', '.join(rules['choices'])}")
    bounds = [f"{sign} {rules[side]:g}" for side, sign in (("low", ">="), ("high", "<=")) if rules[side] is not None]
    return "; ".join([*parts, *bounds])
