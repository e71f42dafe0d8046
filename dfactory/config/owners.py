"""Whose a key is. The keys of all entries of a seam are one flat dataclass; the selected entry says which are valid.

combine("RuleKeys", RULES)                       one dataclass with the keys of every rule
refuse_foreign(keys, origins, RULES, selected)   ConfigError for a key that the selected rule does not have
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from dfactory.errors import ConfigError


class Owner(Protocol):
    """An entry of a seam, as far as its keys are concerned."""

    name: str
    Keys: type
    """A dataclass of keys (config/keys.py). Entries that share a key inherit it from one dataclass that declares it."""

    @property
    def selector(self) -> str:
        """The key and value that select the entry, such as `decode.rule threshold`."""

    @property
    def wide_selector(self) -> str:
        """What selects it together with the entries that share its parent; the selector again where none do."""


def combine(name: str, entries: Iterable[Owner], module: str) -> type:
    """A dataclass with the keys of all entries, in the order in which they are declared. Raises ConfigError for a key that
    two entries declare apart: its meaning would depend on who reads it."""
    declared: dict[str, tuple[type, dataclasses.Field, Any]] = {}
    for entry in entries:
        for kind in reversed(entry.Keys.__mro__):
            own = vars(kind).get("__annotations__", {})
            for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
                if field.name not in own:
                    continue
                known = declared.setdefault(field.name, (kind, field, own[field.name]))
                if known[0] is not kind:
                    raise ConfigError(
                        f"key {field.name} is declared by {known[0].__module__} and by {kind.__module__}: let both "
                        "inherit it from one dataclass, or give it another name"
                    )
    fields = [(key, kind, _copy(field)) for key, (_, field, kind) in declared.items()]
    combined = dataclasses.make_dataclass(name, fields)
    combined.__module__ = module
    return combined


def _copy(field: dataclasses.Field) -> dataclasses.Field:
    return dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=field.metadata)


def key_names(entry: Owner) -> set[str]:
    return {field.name for field in dataclasses.fields(entry.Keys)}


def owners_of(key: str, entries: Iterable[Owner]) -> list[Owner]:
    """The entries that have a key; none for a key that belongs to all."""
    return [entry for entry in entries if key in key_names(entry)]


def refuse_foreign(
    values: Any, origins: Mapping[str, str], entries: Iterable[Owner], selected: Owner, prefix: str = ""
) -> None:
    """Raise ConfigError for a key that was given (`origins`: dotted key -> where), that other entries have and `selected`
    has not. One that has its default is let pass: the resolved recipe of a run holds every key."""
    entries, own = list(entries), key_names(selected)
    for field in dataclasses.fields(values):
        dotted = f"{prefix}{field.name}"
        if dotted not in origins or field.name in own or getattr(values, field.name) == default_of(field):
            continue
        if owners := owners_of(field.name, entries):
            raise ConfigError(
                f"{dotted} in {origins[dotted]} belongs to {either(owners, entries)}, and this is {selected.selector}: "
                "leave it out"
            )


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def either(owners: Iterable[Owner], entries: Iterable[Owner]) -> str:
    """Their selectors in words: `stage cap, cpt or sft`; or the wide selector of which all entries are there: `stage rl`."""
    owners, values = list(owners), {}
    whole = {e.wide_selector for e in entries} - {e.wide_selector for e in entries if e not in owners}
    for owner in owners:
        key, value = (owner.wide_selector if owner.wide_selector in whole else owner.selector).split(" ", 1)
        names = values.setdefault(key, [])
        if value not in names:
            names.append(value)
    return " or ".join(f"{key} {_or(names)}" for key, names in values.items())


def _or(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
