"""Layers of keys, from YAML or `key=value` words -> a checked dataclass. Every mistake is a ConfigError that names the key.

Knows no recipe: a schema is any dataclass of keys (keys.py).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfactory.config.elsewhere import meant_by, meant_in, without_neutral
from dfactory.config.merge import MergeKeys
from dfactory.errors import ConfigError

NOT_YAML = (yaml.YAMLError, OmegaConfBaseException, ValueError)  # what OmegaConf raises for text that it cannot read
COMMAND_LINE = "the command line"


BOOLEANS = {True: ("on", "yes"), False: ("off", "no")}  # words that YAML reads as such


def load_merge_keys(words: list[str]) -> MergeKeys:
    """`topk=3 metric=eval/loss` -> MergeKeys."""
    return merge_layers(MergeKeys, [("--merge", parse_overrides(words))])


def parse_overrides(overrides: list[str]) -> DictConfig:
    items = [item.removeprefix("--") for item in overrides]
    for item in items:
        if "=" not in item:
            raise ConfigError(f"override {item!r} is not key=value")
    try:
        return OmegaConf.from_dotlist(items)
    except NOT_YAML as problem:
        raise ConfigError(f"cannot read the overrides {items}: {problem}") from problem


def merge_layers(schema: type, layers: list[tuple[str, DictConfig]]) -> Any:
    merged = OmegaConf.structured(schema)
    for origin, layer in layers:
        layer = _in_our_words(schema, layer)
        refuse_unknown_keys(schema, layer, origin)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as problem:
            name = getattr(problem, "full_key", None) or "a key"
            raise ConfigError(f"{name} in {origin}: {str(problem).splitlines()[0]}") from problem
    origins = " and ".join(origin for i, (origin, layer) in enumerate(layers) if layer or i == 0)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing in {origins}: the key is required")
    try:
        values = OmegaConf.to_object(merged)
    except OmegaConfBaseException as problem:
        raise ConfigError(f"{origins}: {str(problem).splitlines()[0]}") from problem
    check_values(values, origins)
    return values


def _in_our_words(schema: type, layer: DictConfig) -> DictConfig:
    """A layer without the values by which other frameworks say "nothing", and with the words that YAML reads as booleans."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    plain = without_neutral(OmegaConf.to_container(layer), set(fields))
    return OmegaConf.create({name: _as_written(fields.get(name), value) for name, value in plain.items()})


def _as_written(field: dataclasses.Field | None, value: Any) -> Any:
    """`first_loss_check: off` is false in YAML, and means the choice "off"."""
    if field is None or not field.metadata or not isinstance(value, bool):
        return value
    return next((word for word in BOOLEANS[value] if word in (field.metadata["choices"] or ())), value)


def known_keys(schema: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every dotted key of a schema, with the dataclass field that declares it."""
    keys = {}
    for field in dataclasses.fields(schema):
        keys[prefix + field.name] = field
        if dataclasses.is_dataclass(field.type):
            keys |= known_keys(field.type, f"{prefix}{field.name}.")
    return keys


def refuse_unknown_keys(schema: type, layer: Mapping[str, Any], origin: str, prefix: str = "") -> None:
    known = {field.name: field for field in dataclasses.fields(schema)}
    for name in layer:
        dotted = f"{prefix}{name}"
        if name not in known:
            every = known_keys(schema, prefix)
            near = meant_by(dotted, every) or next(
                iter(difflib.get_close_matches(dotted, every, n=1, cutoff=0.6)), None
            )
            hint = f"; did you mean {near}?" if near else "; `dfactory schema` lists every key"
            if isinstance(layer[name], Mapping) and (inside := meant_in(dotted, layer[name], every)):
                told = ", ".join(f"{foreign} is {here}" for foreign, here in inside)
                hint = f"; the keys of a recipe have no such groups: {told}"
            raise ConfigError(f"unknown key {dotted} in {origin}{hint}")
        inner = known[name].type
        if dataclasses.is_dataclass(inner) and OmegaConf.is_dict(layer[name]):
            refuse_unknown_keys(inner, layer[name], origin, f"{dotted}.")


def check_values(values: Any, origin: str, prefix: str = "") -> None:
    """Bounds and choices that the fields declare."""
    for field in dataclasses.fields(values):
        value, name = getattr(values, field.name), f"{prefix}{field.name}"
        for inner in value if isinstance(value, list) else [value]:
            if dataclasses.is_dataclass(inner):
                check_values(inner, origin, f"{name}.")
        if value is None or not field.metadata:
            continue
        choices, low, high = (field.metadata[rule] for rule in ("choices", "low", "high"))
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name} {value} in {origin}: it must be one of {', '.join(choices)}{hint}")
        if low is not None and value < low:
            raise ConfigError(f"{name} {value} in {origin}: it must be at least {low:g}")
        if high is not None and value > high:
            raise ConfigError(f"{name} {value} in {origin}: it must be at most {high:g}")
