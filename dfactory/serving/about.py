"""What a form needs to know of the models and of the decode keys: names, types, bounds, meanings, values."""

import dataclasses
import inspect
from typing import Any, get_args, get_origin

from dfactory.config.owners import default_of, key_names
from dfactory.decoding.keys import DecodeKeys, RuleKeys, valid_keys
from dfactory.decoding.rules.base import RULES
from dfactory.errors import ConfigError
from dfactory.serving.fields import DECODE_FIELDS
from dfactory.serving.requests import Reader
from dfactory.types import NO_MASK


def about(readers: list[Reader]) -> dict[str, Any]:
    return {
        "models": [_model(reader) for reader in readers],
        "rules": [_rule(rule) for rule in RULES],
        "keys": [_key(field) for field in dataclasses.fields(DecodeKeys) if field.name in DECODE_FIELDS],
    }


def _model(reader: Reader) -> dict[str, Any]:
    vocabulary, keys = reader.vocabulary, reader.pipeline.keys
    renoises = vocabulary.special.mask == NO_MASK
    return {
        "name": reader.name,
        "chat": _has_template(reader),
        "text": vocabulary.encoder is not None,
        "max_length": reader.longest,
        "block_size": reader.pipeline.rules.block_size,
        "sees_whole_document": vocabulary.sees_whole_document,
        "rules": [rule.name for rule in RULES if rule.renoises == renoises],
        "keys": {name: value for name, value in valid_keys(keys).items() if name in DECODE_FIELDS}
        | {"max_new_tokens": min(keys.max_new_tokens, reader.longest)},
    }


def _has_template(reader: Reader) -> bool:
    try:
        return reader.vocabulary.encoder is not None and bool(reader.vocabulary.encoder.template)
    except ConfigError:
        return False


def _rule(rule) -> dict[str, Any]:
    what = inspect.cleandoc(rule.__doc__).partition("\n\n")[0]
    return {"name": rule.name, "what": what, "keys": [field.name for field in dataclasses.fields(rule)]}


def _key(field: dataclasses.Field) -> dict[str, Any]:
    kinds = get_args(field.type) if get_origin(field.type) is not list else (field.type,)
    kind = (kinds or (field.type,))[0]
    owners = [rule.name for rule in RULES if field.name in key_names(rule)]
    bounds = {name: field.metadata[name] for name in ("choices", "low", "high")}
    return {
        "name": field.name,
        "type": "list" if get_origin(kind) is list else kind.__name__,
        "optional": type(None) in kinds,
        "default": default_of(field),
        "help": field.metadata["help"],
        "rules": owners if field.name in {known.name for known in dataclasses.fields(RuleKeys)} else None,
        **bounds,
    }
