"""Finds out what any model was made from that a recipe or a command line can name (lineage.py)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from dfactory.errors import CheckpointError
from dfactory.models.adapters import adapter_base, is_adapters
from dfactory.models.headers import weight_files
from dfactory.models.hub import hub_name
from dfactory.models.manifest import MANIFEST, read_manifest
from dfactory.models.tiny import TINY_DIR, TINY_NAME
from dfactory.redaction import shareable
from dfactory.runs.evaluations import evaluations_at
from dfactory.runs.folder import RECIPE, STATE, run_of, step_of
from dfactory.runs.hashing import hash_file
from dfactory.runs.lineage import (
    DIRECTORY,
    EMBEDDED,
    GGUF,
    HUB,
    Base,
    Export,
    Licence,
    Lineage,
    Source,
    Training,
    read_lineage,
)

CARD, PROVENANCE = "README.md", "provenance.json"


# --- any model ---------------------------------------------------------------------------------------------------------


def lineage_of(model_dir: Path) -> Lineage:
    """Of a model directory, as `resolve` gives it. A checkpoint in its run folder brings the evaluations along that are
    recorded there; one that an earlier version wrote has what its recipe says. Raises CheckpointError where what is
    recorded is damaged."""
    found = read_lineage(model_dir)
    if found is None and (model_dir / RECIPE).is_file():
        found = _of_earlier_version(model_dir)
    if found is None:
        return Lineage(base_of(model_dir))
    if (run := run_of(model_dir)) is not None and found.history and isinstance(found.history[-1], Training):
        evaluations = evaluations_at(run, step_of(model_dir))
        last = dataclasses.replace(found.history[-1], evaluations=evaluations)
        found = dataclasses.replace(found, history=(*found.history[:-1], last))
    return found


def base_of(model_dir: Path) -> Base:
    """Of a directory that no run of dFactory has made, as far as its files tell. Its weights are not hashed."""
    told, stated = _stated(model_dir), _metadata(model_dir / CARD)
    kind, name, revision = DIRECTORY, model_dir.resolve().name, None
    if model_dir == TINY_DIR:
        return Base(EMBEDDED, TINY_NAME, licence=Licence("apache-2.0"))  # that of dFactory, whose file it is
    if on_hub := hub_name(model_dir):
        kind, (name, revision) = HUB, on_hub
    elif told.get("source") == GGUF:
        kind, name = GGUF, told.get("name") or name
    licence = Licence(*(_word(stated.get(field.name)) for field in dataclasses.fields(Licence)))
    return Base(
        kind,
        name,
        revision,
        licence=Licence(told["license"]) if told.get("license") else licence,
        language=_words(stated.get("language")),
        has_card=(model_dir / CARD).is_file(),
        gguf={name: told[name] for name in ("file", "sha256", "quantisation") if told.get(name)},
        adapters_of=base_of(adapter_base(model_dir)) if is_adapters(model_dir) else None,
    )


def with_sums(lineage: Lineage, model_dir: Path) -> Lineage:
    """With the SHA-256 of the base's weights, where the directory is that base and nothing else names its content. They are
    read now."""
    if lineage.history or lineage.base.revision or lineage.base.weights:
        return lineage
    sums = {file.name: hash_file(file).sha256 for file in own_weights(model_dir)}
    known = {} if None in sums.values() else sums
    return dataclasses.replace(lineage, base=dataclasses.replace(lineage.base, weights=known))


def own_weights(model_dir: Path) -> list[Path]:
    """The weight files of a directory; of LoRA adapters those, not their base's."""
    return sorted(model_dir.glob("adapter_model*.safetensors")) if is_adapters(model_dir) else weight_files(model_dir)


def source_of(model_dir: Path) -> Source:
    """How a model directory is called, with the sums of its weights where they are recorded."""
    if on_hub := hub_name(model_dir):
        return Source(*on_hub)
    if model_dir == TINY_DIR:
        return Source(TINY_NAME)
    run = run_of(model_dir)
    name = model_dir.resolve().name if run is None else f"{run.resolve().name}/{model_dir.name}"
    return Source(name, weights=_recorded_sums(model_dir))


def _recorded_sums(model_dir: Path) -> dict[str, str]:
    if (model_dir / MANIFEST).is_file():
        manifest = read_manifest(model_dir)
        return {name: entry.sha256 for name, entry in manifest.items() if is_weights(name)}
    lineage = read_lineage(model_dir)
    last = lineage.history[-1] if lineage is not None and lineage.history else None
    return last.weights if isinstance(last, Export) else {}


def is_weights(name: str) -> bool:
    """Of a file, by its path in a model directory."""
    return "/" not in name and name.endswith(".safetensors")


def _of_earlier_version(checkpoint: Path) -> Lineage:
    """A checkpoint without a lineage, of the recipe in it."""
    try:
        keys, state = yaml.safe_load((checkpoint / RECIPE).read_text()), json.loads((checkpoint / STATE).read_text())
        named, stage, step = str(keys["model_name_or_path"]), str(keys["stage"]), int(state["step"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as problem:
        raise CheckpointError(f"{checkpoint} holds no recipe and state that can be read: {problem!r}") from problem
    named = shareable(named)
    run, recipe = checkpoint.parent.resolve().name, as_yaml(keys)
    training = Training(stage, run, Source(named), recipe, step, tokens=int(state.get("tokens", 0)) or None)
    return Lineage(Base(DIRECTORY, named)).then(training)


def _stated(model_dir: Path) -> dict[str, str]:
    """provenance.json, which `dfactory data gguf` writes: its texts."""
    file = model_dir / PROVENANCE
    try:
        raw = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as problem:
        raise CheckpointError(
            f"{file} is not JSON: {problem}; write the directory again, or remove the file"
        ) from problem
    return {name: shareable(value) for name, value in raw.items() if isinstance(value, str)}


def _metadata(card: Path) -> dict[str, Any]:
    """The front matter of a card; of one without, or without a valid one, nothing."""
    try:
        return (metadata_load(card) or {}) if card.is_file() else {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _words(value: Any) -> list[str]:
    return [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]


def as_yaml(keys: dict[str, Any]) -> str:
    """A recipe as strangers may read it."""
    return yaml.safe_dump(shareable(keys), sort_keys=False, allow_unicode=True, width=1000)
