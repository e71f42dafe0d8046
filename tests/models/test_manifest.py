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
    list_problems,
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


SUM = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "3",
        "[" * 100_000,
        b"\xff\xfe",
        '{"a": 3}',
        '{"a": null}',
        '{"a": [1, 2]}',
        '{"a": {"size": 3}}',
        json.dumps({"a": {"size": "3", "sha256": SUM}}),
        json.dumps({"a": {"size": True, "sha256": SUM}}),
        json.dumps({"a": {"size": 3.0, "sha256": SUM}}),
        json.dumps({"a": {"size": -1, "sha256": SUM}}),
        json.dumps({"a": {"size": 3, "sha256": 5}}),
        json.dumps({"a": {"size": 3, "sha256": SUM.replace("0", "g")}}),
        json.dumps({"a": {"size": 3, "sha256": SUM, "more": 1}}),
        *(
            json.dumps({name: {"size": 3, "sha256": SUM}})
            for name in ("", ".", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a/", "a\0b", MANIFEST)
        ),
    ],
)
def test_a_broken_manifest_is_refused(checkpoint, text):
    (checkpoint / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match="is not a manifest"):
        read_manifest(checkpoint)


def test_what_a_manifest_has_to_list(checkpoint):
    whole = read_manifest(checkpoint)
    assert list_problems(checkpoint, whole) == []
    assert list_problems(checkpoint, {}) == [
        "the manifest lists no config.json or adapter_config.json",
        "the manifest lists no *.safetensors",
        "model.safetensors is not in the manifest",
    ]
    (checkpoint / "notes.txt").write_text("added later")
    assert list_problems(checkpoint, whole) == []
    save_file({"b": torch.zeros(1)}, checkpoint / "model-2.safetensors")
    assert list_problems(checkpoint, whole) == ["model-2.safetensors is not in the manifest"]
    below = {f"engine/{name}": entry for name, entry in whole.items()}
    assert "the manifest lists no *.safetensors" in list_problems(checkpoint, below)


def test_weights_that_the_manifest_does_not_list_are_not_read(checkpoint):
    (checkpoint / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors is not in its manifest"):
        read_shapes(checkpoint)


def test_weights_of_another_size_than_the_manifest_says_are_not_read(checkpoint):
    assert read_shapes(checkpoint) == {"a": (100,)}
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["model.safetensors"]["size"] += 1
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors has"):
        read_shapes(checkpoint)
