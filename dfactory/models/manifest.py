"""The manifest of a checkpoint: the size and SHA-256 of each of its files. It is written last.

What cannot be a whole file of its kind gets no entry: a manifest must not vouch for a file that was cut short before it was
hashed. Files are hashed as streams, so memory stays bounded.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from dfactory.errors import CheckpointError

MANIFEST = "engine/manifest.json"

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
            zipfile.ZipFile(file).close()  # what names its parts stands at its end
        elif file.suffix == ".json":
            json.loads(file.read_bytes())
    except (SafetensorError, zipfile.BadZipFile, ValueError) as problem:
        raise CheckpointError(f"{file} was cut short or spoilt while it was written: {problem}") from problem


def manifest_text(manifest: Manifest) -> str:
    return json.dumps({name: entry._asdict() for name, entry in sorted(manifest.items())}, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Raises CheckpointError where there is none, or a broken one."""
    file = directory / MANIFEST
    try:
        return {name: Entry(**entry) for name, entry in json.loads(file.read_text()).items()}
    except FileNotFoundError as problem:
        raise CheckpointError(f"{directory} holds no {MANIFEST}: its saving was not finished") from problem
    except (ValueError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{file} is not a manifest: {problem}") from problem


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
        with (directory / name).open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != entry.sha256:
            found.append(f"{name} has changed: SHA-256 {sha256[:12]}, the manifest says {entry.sha256[:12]}")
    return found


def check_sizes(model_dir: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError where a checkpoint's manifest tells other sizes of these files; other directories pass."""
    if not (model_dir / MANIFEST).is_file():
        return
    manifest = read_manifest(model_dir)
    if problems := size_problems(model_dir, {name: manifest[name] for name in names if name in manifest}):
        raise CheckpointError(f"{model_dir} is damaged: {'; '.join(problems)}; take another checkpoint")
