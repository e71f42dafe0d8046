"""Model directories that want to run code, or to have files read and copied that are not theirs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dfactory.errors import CheckpointError
from dfactory.models.hub import resolve
from dfactory.models.registry import load_policy, read_tokenizer, trained_block_size
from dfactory.models.saving import save_policy
from dfactory.models.tiny import TINY_DIR
from tests.models.conftest import GOLDEN_DIR
from tests.planted import Evil


@pytest.fixture
def trace(tmp_path) -> Path:
    """What would be there if code had been run; a pickle of Evil does make it."""
    torch.save(Evil(tmp_path / "shown"), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "shown").exists()
    return tmp_path / "executed"


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN_DIR / "llada2_tiny", tmp_path / "model"))


def adapters(tmp_path: Path, **keys) -> Path:
    directory = tmp_path / "adapters"
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(GOLDEN_DIR / "llada2_tiny"), "target_modules": ["q"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | keys))
    return directory


PICKLES = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "rng_state.pth", "tokenizer.pkl")


def test_pickles_beside_the_weights_are_not_touched(model, trace, tmp_path):
    for name in PICKLES:
        torch.save({"x": Evil(trace)}, model / name)
    (tmp_path / "out").mkdir()
    save_policy(load_policy(model), tmp_path / "out")
    assert not trace.exists()
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights are read from safetensors only"):
        load_policy(model)
    (model / "model.safetensors").write_bytes((model / "pytorch_model.bin").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        load_policy(model)
    assert not trace.exists()


def test_pickled_adapters_are_refused_by_name(trace, tmp_path):
    directory = adapters(tmp_path)
    torch.save({"x": Evil(trace)}, directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"lacks adapter_model\.safetensors: .* safetensors only"):
        load_policy(directory)
    assert not trace.exists()


def test_code_of_a_tokenizer_is_not_run(trace, tmp_path):
    directory = Path(shutil.copytree(TINY_DIR, tmp_path / "model"))
    for name in ("tokenizer_config.json", "config.json"):
        keys = json.loads((directory / name).read_text())
        keys |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}}
        (directory / name).write_text(json.dumps(keys))
    (directory / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: ...\n")
    assert read_tokenizer(directory) is not None
    load_policy(directory)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "a/b.safetensors", "..", "", "x/"])
def test_an_index_names_files_beside_it_only(name, model, tmp_path):
    weights = load_file(model / "model.safetensors")
    shutil.move(model / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(weights, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="give file names without a path"):
        load_policy(model)


@pytest.mark.parametrize("name", ["../model", "/etc", ".", "", "a/../../model", "checkpoint-1/.."])
def test_latest_names_a_folder_beside_it_only(name, model, tmp_path):
    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    (tmp_path / "run/LATEST").write_text(f"{name}\n")
    with pytest.raises(CheckpointError, match="must name a folder beside it"):
        resolve(tmp_path / "run")


def test_a_link_out_of_the_directory_is_not_copied(model, tmp_path):
    (tmp_path / "secret").write_text("private key")
    (model / ".env").write_text("private key")
    (model / "LICENSE").symlink_to("../secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"LICENSE is a link to .*secret, outside of its directory"):
        save_policy(load_policy(model), tmp_path / "out")
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to("config.json")
    save_policy(load_policy(model), tmp_path / "out")
    assert (tmp_path / "out/LICENSE").is_file()
    assert not (tmp_path / "out/.env").exists()


def test_the_links_of_the_hubs_cache_are_followed(model, tmp_path):
    """snapshots/COMMIT/NAME -> ../../blobs/HASH."""
    snapshot, blobs = tmp_path / "hub/snapshots/0a", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        shutil.copyfile(file, blobs / f"hash of {file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash of {file.name}")
    (tmp_path / "out").mkdir()
    save_policy(load_policy(snapshot), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING' in .*adapter_config.json is not supported"),
        ({"base_model_name_or_path": "org/na/me"}, "is not a directory"),
        ({"base_model_name_or_path": ["x"]}, "is not a directory"),
    ],
)
def test_other_adapters_are_refused(keys, said, tmp_path):
    directory = adapters(tmp_path, **keys)
    (directory / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=said):
        load_policy(directory)


def test_adapters_of_themselves_are_refused(tmp_path):
    directory = adapters(tmp_path, base_model_name_or_path=str(tmp_path / "adapters"))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="leads back to"):
        load_policy(directory)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "\ud800", "{", "3"])
@pytest.mark.parametrize("name, read", [("config.json", load_policy), ("generation_config.json", trained_block_size)])
def test_json_that_is_no_object(name, read, text, model):
    (model / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=rf"{name} is not a JSON object"):
        read(model)


def shapes_file(file: Path, count: int) -> None:
    """A safetensors file whose header names so many empty tensors."""
    entries = {f"model.layers.{n}.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(count)}
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


MEASURED = """
import json, resource, sys, time
from dfactory.errors import DFactoryError
from dfactory.models.registry import load_policy
from tests.models.conftest import GOLDEN_DIR

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

load_policy(GOLDEN_DIR / "llada2_tiny")
for directory in sys.argv[1:]:
    before, started, said = megabytes(), time.process_time(), "loaded"
    try:
        load_policy(directory)
    except DFactoryError as problem:
        said = str(problem)[:300]
    print(json.dumps([said, time.process_time() - started, megabytes() - before]))
"""

TOO_LARGE = [  # keys of config.json, what is said
    ({"num_hidden_layers": 10**7}, "num_hidden_layers 10000000 in .* a whole number from 1 to 1,000"),
    ({"num_hidden_layers": 1_000}, "num_hidden_layers is 1,000, but the weights hold 3"),
    ({"num_experts": 10**7}, "num_experts 10000000 in .* a whole number from 1 to 10,000"),
    ({"num_experts": 10_000}, "num_experts is 10,000, but the weights hold 16"),
    ({"num_attention_heads": 0}, "num_attention_heads 0 in "),
    ({"hidden_size": 10**6, "vocab_size": 10**7}, "has shape .*, not "),
]


@pytest.mark.slow
def test_sizes_are_compared_with_the_weights_before_anything_is_built(model, tmp_path):
    """Peak memory and time of each refusal, in a process of their own."""
    directories = [Path(shutil.copytree(model, tmp_path / str(n))) for n in range(len(TOO_LARGE) + 2)]
    for directory, (keys, _) in zip(directories, TOO_LARGE, strict=False):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | keys))
    bomb, full = directories[-2:]
    shapes_file(bomb / "model.safetensors", 600_000)
    shapes_file(full / "model.safetensors", 150_000)  # as many as are read
    command = [sys.executable, "-c", MEASURED, *map(str, directories)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [said for _, said in TOO_LARGE] + [
        "states a header of .* bytes: those of a model have 16,777,216 at most"
    ]
    for (said, seconds, megabytes), wanted in zip(found[:-1], expected, strict=True):
        assert re.search(wanted, said), said
        assert seconds < 2, said
        assert megabytes < 100, said
    said, seconds, megabytes = found[-1]
    assert "does not fit its config.json: missing tensor" in said
    assert seconds < 10
    assert megabytes < 1_000


@pytest.mark.parametrize(
    "name, read",
    [
        ("config.json", load_policy),
        ("generation_config.json", trained_block_size),
        ("model.safetensors.index.json", load_policy),
    ],
)
def test_json_of_a_bomb_is_refused_unread(name, read, model):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b'{"x": [' + b"[]," * 7_000_000 + b"[]]}")
    with pytest.raises(CheckpointError, match=rf"{name} has 21,000,0\d\d bytes: "):
        read(model)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 2_000_000, "is not a JSON object"),
        (
            '{"added_tokens": [' + "{}," * 65_536 + "{}]}",
            "added_tokens in .*tokenizer.json has 65,537 entries: at most 65,536",
        ),
        ('{"x": "' + "x" * 134_217_728 + '"}', "has 134,217,7.. bytes: at most 134,217,728 are read"),
    ],
    ids=["nesting", "added tokens", "size"],
)
def test_a_tokenizer_that_would_take_minutes_is_refused(text, said, model):
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(model)
