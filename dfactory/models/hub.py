"""From what a recipe or a command line names as a model to its directory: the one function that all of them call."""

import functools
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from dfactory.errors import CheckpointError
from dfactory.hub import is_hub_name, refusal
from dfactory.models.headers import is_plain_name
from dfactory.models.tiny import TINY_DIR, TINY_NAME

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.md", "LICENSE*")
"""Configuration, tokenizer, chat templates, and what `saving` carries along."""
WEIGHT_FILES = ("model*.safetensors", "adapter_model*.safetensors")
_SNAPSHOT = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")


def resolve(
    path_or_id: str | Path, revision: str | None = None, *, weights: bool = True, key: str = "model_name_or_path"
) -> Path:
    """The directory of `tiny`, of a local model, of a run folder (its newest checkpoint), or of a model on the hub.

    A local path comes before a name on the hub, which is `org/name`, or `org/name@revision` where a revision cannot be given
    apart. Without `weights` only the small files are downloaded. What is in the cache is not downloaded again.
    `key` is what names it, for messages.
    Raises CheckpointError for a path that is none, ConfigError for a name that the hub does not give.
    """
    name = str(path_or_id)
    if name == TINY_NAME:
        return TINY_DIR
    path = Path(name)
    if path.is_dir():
        return _newest_checkpoint(path)
    name, at, suffix = name.partition("@")
    if is_hub_name(name):
        return _download(name, suffix if at else revision, weights, key)
    raise CheckpointError(
        f"{key} {path} is not a directory: give one with config.json and *.safetensors, the name of a model "
        "on the hub (org/name), or `tiny`"
    )


def _newest_checkpoint(path: Path) -> Path:
    """Of a run folder, or the best one where its recipe asked for it; any other directory is itself."""
    latest = next((path / name for name in ("BEST", "LATEST") if (path / name).is_file()), None)
    if latest is None:
        return path
    name = latest.read_text().strip()
    if not is_plain_name(name):
        raise CheckpointError(f"{latest} holds {name[:80]!r}: it must name a folder beside it, such as checkpoint-20")
    return path / name


@functools.cache
def _download(name: str, revision: str | None, weights: bool, key: str) -> Path:
    """Cached: one request to the hub per process."""
    patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as problem:  # all of huggingface_hub's errors of files and of HTTP are OSErrors
        raise refusal(problem, f"{key} {name} is not a local path and cannot be read", revision) from problem
    return folder


def is_downloaded(model_dir: Path) -> bool:
    """Whether the weights are there. Without them only a directory in the hub's cache is what it should be."""
    return hub_name(model_dir) is None or any(next(model_dir.glob(pattern), None) for pattern in WEIGHT_FILES)


def hub_name(model_dir: Path) -> tuple[str, str] | None:
    """(id, commit) of a directory in the hub's cache: how another machine finds it. None for any other directory."""
    match = _SNAPSHOT.fullmatch(str(model_dir))
    return (f"{match[1]}/{match[2]}", match[3]) if match else None
