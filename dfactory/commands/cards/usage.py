"""How a model directory is used: lines that work, and what a decoder has to know."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from dfactory.commands.cards.markdown import UNKNOWN, code
from dfactory.errors import ConfigError
from dfactory.models.headers import dtype_name, stored_dtype
from dfactory.models.registry import read_family, trained_block_size
from dfactory.runs.lineage import Lineage
from dfactory.vocabulary import Vocabulary, read_vocabulary

IDS = ("mask_token_id", "eos_token_id")


def usage(model_dir: Path, name: str, lineage: Lineage) -> dict[str, Any]:
    """What the template's section on use fills in. `name` is the directory's."""
    recipe = recipe_keys(lineage)
    ids = {key: recipe[key] for key in IDS if type(recipe.get(key)) is int}
    vocabulary = _vocabulary(model_dir, ids)
    keys, keys_from = decode_keys(lineage, recipe)
    keys |= {key: ids[key] for key in IDS[1:] if key in ids and (vocabulary is None or vocabulary.tokenizer is None)}
    config = json.loads((model_dir / "config.json").read_text())
    model_type, remote = str(config.get("model_type")), "auto_map" in config
    arguments = [json.dumps(name, ensure_ascii=False), *(f"{key}={value!r}" for key, value in keys.items())]
    loading = [arguments[0], *(["trust_remote_code=True"] if remote else [])]
    return {
        "path": shlex.quote(name),
        "arguments": ", ".join(arguments),
        "overrides": " ".join(shlex.quote(f"decode.{key}={_yaml(value)}") for key, value in keys.items()),
        "keys_from": keys_from,
        "messages": vocabulary is not None and _has_template(vocabulary),
        "has_tokenizer": vocabulary is not None and vocabulary.tokenizer is not None,
        "family": read_family(model_dir).name,
        "block_size": trained_block_size(model_dir) or "none: it sees whole documents",
        "mask": _token(vocabulary, "mask"),
        "eos": _token(vocabulary, "eos"),
        "dtype": dtype_name(stored_dtype(model_dir)),
        "transformers": ", ".join(loading) if remote or model_type in CONFIG_MAPPING_NAMES else "",
        "remote_code": remote,
        "model_type": model_type,
    }


def recipe_keys(lineage: Lineage) -> dict[str, Any]:
    """Of the last training; what is no recipe has none."""
    if not lineage.trainings:
        return {}
    try:
        keys = yaml.safe_load(lineage.trainings[-1].recipe)
    except yaml.YAMLError:
        return {}
    return keys if isinstance(keys, dict) else {}


def decode_keys(lineage: Lineage, recipe: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The keys to decode with, and where they come from: the last evaluation, else the recipe, else the defaults."""
    evaluations = lineage.trainings[-1].evaluations if lineage.trainings else []
    measured = [one for one in evaluations if one.decode]
    if measured:
        return _plain(measured[-1].decode), "those of the last evaluation below"
    stated = recipe.get("decode")
    if isinstance(stated, dict):
        chosen = {key: stated[key] for key in ("rule", "max_new_tokens") if key in stated}
        return _plain(chosen), "those of the recipe; all others have their defaults"
    return {}, "the defaults"


def _plain(keys: dict[str, Any]) -> dict[str, Any]:
    """Those whose names and values can be written as they stand; the block size is known from the directory."""
    return {
        key: value
        for key, value in keys.items()
        if key.isidentifier() and key not in (*IDS, "block_size") and isinstance(value, str | int | float)
    }


def _yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _vocabulary(model_dir: Path, ids: dict[str, int]) -> Vocabulary | None:
    """None where the special ids are not known."""
    try:
        return read_vocabulary(str(model_dir), mask_token_id=None, eos_token_id=ids.get(IDS[1]))
    except ConfigError:
        return None


def _has_template(vocabulary: Vocabulary) -> bool:
    return vocabulary.tokenizer is not None and bool(vocabulary.tokenizer.chat_template)


def _token(vocabulary: Vocabulary | None, which: str) -> str:
    index = getattr(vocabulary.special, which) if vocabulary is not None else None
    if index is None:
        return UNKNOWN
    if index < 0:
        return "none: the noise is uniform"
    if vocabulary.tokenizer is None:
        return f"id {index}"
    return f"{code(vocabulary.tokenizer.convert_ids_to_tokens(index))}, id {index}"
