"""A manifest vouches for whole files only, and names every later change."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dfactory.errors import CheckpointError
from dfactory.models.headers import read_shapes
from dfactory.models.manifest import (
    MANIFEST,
    hash_files,
    hash_problems,
    list_files,
    manifest_text,
    read_manifest,
    size_problems,
)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    (tmp_path / "engine").mkdir()
    save_file({"a": torch.arange(100.0)}, tmp_path / "model.safetensors")
    torch.save({"b": torch.arange(50.0)}, tmp_path / "engine/optim.pt")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / MANIFEST).write_text(manifest_text(hash_files(tmp_path, list_files(tmp_path))))
    return tmp_path


def _problems(checkpoint: Path) -> list[str]:
    manifest = read_manifest(checkpoint)
    return size_problems(checkpoint, manifest) or hash_problems(checkpoint, manifest)


def test_all_files_are_named_the_largest_first_and_equal_themselves(checkpoint):
    names = list_files(checkpoint)
    sizes = [(checkpoint / name).stat().st_size for name in names]
    assert sorted(names) == ["chat_template.jinja", "config.json", "engine/optim.pt", "model.safetensors"]
    assert sizes == sorted(sizes, reverse=True)
    assert _problems(checkpoint) == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "engine/optim.pt", "model.safetensors"])
def test_a_truncated_a_changed_and_a_missing_file_are_named(checkpoint, name):
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[:-1])
    assert _problems(checkpoint) == [f"{name} has {len(whole) - 1:,} bytes, the manifest says {len(whole):,}"]
    (checkpoint / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (problem,) = _problems(checkpoint)
    assert problem.startswith(f"{name} has changed: SHA-256 ")
    (checkpoint / name).unlink()
    assert _problems(checkpoint) == [f"{name} is missing"]


@pytest.mark.parametrize("name", ["config.json", "engine/optim.pt", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_that_was_cut_before_it_was_hashed_gets_no_entry(checkpoint, name, share):
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=f"{name} was cut short or spoilt"):
        hash_files(checkpoint, [name])


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"a": {"size": 3}}'])
def test_a_broken_manifest_is_refused(checkpoint, text):
    (checkpoint / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="is not a manifest"):
        read_manifest(checkpoint)


def test_weights_of_another_size_than_the_manifest_says_are_not_read(checkpoint):
    assert read_shapes(checkpoint) == {"a": (100,)}
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["model.safetensors"]["size"] += 1
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors has"):
        read_shapes(checkpoint)
