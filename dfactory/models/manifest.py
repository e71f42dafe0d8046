"""The manifest of a checkpoint: the size and SHA-256 of each of its files. It is written last.

What cannot be a whole file of its kind gets no entry: a manifest must not vouch for a file that was cut short before it was
hashed. Files are hashed as streams, so memory stays bounded.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dfactory.errors import CheckpointError

MANIFEST = "engine/manifest.json"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ZIP = b"PK\x03\x04"


class Entry(NamedTuple):
    size: int  # bytes
    sha256: str


Manifest = dict[str, Entry]  # by path, relative to the checkpoint


def list_files(directory: Path) -> list[str]:
    """What a manifest has to name, the largest first."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    names = {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}
    names.pop(MANIFEST, None)
    return sorted(names, key=lambda name: (-names[name], name))


def hash_files(directory: Path, names: Iterable[str]) -> Manifest:
    """Read the files. Raises CheckpointError for one that is not a whole file of its kind."""
    entries = {}
    for name in names:
        file = directory / name
        _refuse_broken(file)
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        entries[name] = Entry(file.stat().st_size, sha256)
    return entries


def _refuse_broken(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_ZIP))
        if file.suffix == ".safetensors":
            safe_open(file, framework="np")  # compares its header with its size
        elif file.suffix == ".pt" and (start == _ZIP or not start):
            zipfile.ZipFile(file).close()  # its directory is at the end
        elif file.suffix == ".json":
            json.loads(file.read_bytes())
    except (SafetensorError, zipfile.BadZipFile, ValueError) as problem:
        raise CheckpointError(f"{file} was cut short or spoilt while it was written: {problem}") from problem


def manifest_text(manifest: Manifest) -> str:
    return json.dumps({name: entry._asdict() for name, entry in sorted(manifest.items())}, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Raises CheckpointError where there is none, or what is there is not: sizes and sums by plain relative names."""
    file = directory / MANIFEST
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError as problem:
        raise CheckpointError(f"{directory} holds no {MANIFEST}: its saving was not finished") from problem
    except (ValueError, OSError, RecursionError) as problem:
        raise CheckpointError(f"{file} is not a manifest: {problem}") from problem
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a manifest: it holds no object of file names")
    for name, entry in raw.items():
        if not _is_inside(name):
            raise CheckpointError(f"{file} is not a manifest: {name!r} is not the name of a file below {directory}")
        if not _is_entry(entry):
            raise CheckpointError(f"{file} is not a manifest: {name} has {str(entry)[:100]}, not a size and a SHA-256")
    return {name: Entry(**entry) for name, entry in raw.items()}


def _is_inside(name: str) -> bool:
    """Whether a name, as `list_files` writes it, leads to a file below the directory and to nothing else."""
    path = PurePosixPath(name)
    plain = bool(path.name) and not path.is_absolute() and path.as_posix() == name
    return plain and ".." not in path.parts and "\0" not in name and name != MANIFEST


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != set(Entry._fields):
        return False
    size, sha256 = entry["size"], entry["sha256"]
    return type(size) is int and size >= 0 and isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None


def list_problems(directory: Path, manifest: Manifest) -> list[str]:
    """What a manifest has to list and does not: a model's config and weights, and every file that a reader would take for
    weights or engine state. Other files may have been added later."""
    found = [
        f"the manifest lists no {' or '.join(names)}"
        for names in (("config.json", "adapter_config.json"), ("*.safetensors",))
        if not any(PurePosixPath(name).match(pattern) for name in manifest for pattern in names if "/" not in name)
    ]
    read = [*directory.glob("*.safetensors"), *directory.glob("engine/shards/*")]
    names = [file.relative_to(directory).as_posix() for file in read if file.is_file()]
    return found + [f"{name} is not in the manifest" for name in sorted(names) if name not in manifest]


def size_problems(directory: Path, manifest: Manifest) -> list[str]:
    """Files of a manifest that are missing or of another size."""
    found = []
    for name, entry in manifest.items():
        file = directory / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif (size := file.stat().st_size) != entry.size:
            found.append(f"{name} has {size:,} bytes, the manifest says {entry.size:,}")
    return found


def hash_problems(directory: Path, manifest: Manifest) -> list[str]:
    """Files of a manifest whose content is another one; all are read."""
    found = []
    for name, entry in manifest.items():
        try:
            with (directory / name).open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:  # another run's, which removes its old checkpoints
            found.append(f"{name} is missing")
            continue
        if sha256 != entry.sha256:
            found.append(f"{name} has changed: SHA-256 {sha256[:12]}, the manifest says {entry.sha256[:12]}")
    return found


def check_sizes(model_dir: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError where a checkpoint's manifest tells other sizes of these files; other directories pass."""
    if not (model_dir / MANIFEST).is_file():
        return
    manifest, names = read_manifest(model_dir), list(names)
    unlisted = [f"{name} is not in its manifest" for name in names if name not in manifest]
    if problems := unlisted or size_problems(model_dir, {name: manifest[name] for name in names}):
        raise CheckpointError(f"{model_dir} is damaged: {'; '.join(problems)}; take another checkpoint")
