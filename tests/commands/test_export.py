"""Exports of real checkpoints: read back by plain transformers, proved against their source, refused without a trace."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dfactory.commands import export as exporting
from dfactory.commands.export import export, probe_batch
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models import adapters as adapter_module
from dfactory.models.adapters import add_adapters
from dfactory.models.headers import stored_dtype
from dfactory.models.manifest import MANIFEST
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from tests.commands.conftest import GOLDEN, ROOT, save_plain

# Loads a directory as a stranger would, and prints its logits for fixed ids; with a second argument, under peft.
STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
if len(sys.argv) > 2:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, sys.argv[2])
assert not any(name.startswith("dfactory") for name in sys.modules)
with torch.no_grad():
    logits = model.eval()(torch.arange(16)[None]).logits[0].double()
tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
print(json.dumps({"logits": logits.tolist(), "tied": tied, "dtype": str(next(model.parameters()).dtype)}))
"""


def read_as_stranger(*directories: Path) -> dict:
    command = [sys.executable, "-c", STRANGER, *map(str, directories)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def tensor_names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def adapted_policy(base: Path, scale: float, dtype: str):
    return with_random_adapters(load_policy(base, dtype=dtype), scale)


def with_random_adapters(policy, scale: float):
    """Adapters whose second factor, zero when untrained, has random entries of this scale."""
    add_adapters(policy, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def test_golden_llada2_keeps_names_config_and_files(golden_run, tmp_path, capsys):
    assert export(str(golden_run), str(tmp_path / "new" / "out")) == 0
    out = tmp_path / "new" / "out"
    assert tensor_names(out) == tensor_names(GOLDEN)
    assert (out / "modeling_x.py").read_text() == (golden_run.parent / "model" / "modeling_x.py").read_text()
    assert (out / "NOTICE").read_text() == "carry me"
    assert not (out / "engine").exists()
    assert json.loads((out / "config.json").read_text()) == json.loads((GOLDEN / "config.json").read_text())
    trained = load_file(golden_run / "checkpoint-3" / "model.safetensors")
    exported, before = load_file(out / "model.safetensors"), load_file(GOLDEN / "model.safetensors")
    assert all(torch.equal(trained[name], exported[name]) for name in trained)
    assert any(not torch.equal(before[name], exported[name]) for name in before)
    assert "bit by bit" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_earlier_checkpoint_can_be_named(llama_run, tmp_path):
    assert export(str(llama_run / "checkpoint-1"), str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_llama_loads_in_plain_transformers(llama_run, tmp_path):
    export(str(llama_run), str(tmp_path / "out"))
    seen = read_as_stranger(tmp_path / "out")
    assert seen["tied"] is False
    assert seen["logits"] != read_as_stranger(llama_run.parent / "base")["logits"]


def test_merged_lora_loads_in_plain_transformers(lora_run, tmp_path, capsys):
    """Plain transformers with plain peft on base and adapters, and plain transformers on the export, agree."""
    export(str(lora_run), str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert "8 tensors changed" in told  # q, k, v, o of two layers
    assert "model.layers." in told
    base = lora_run.parent / "base"
    merged = read_as_stranger(tmp_path / "out")
    adapted = read_as_stranger(base, lora_run / "checkpoint-2")
    assert merged["tied"] is True
    torch.testing.assert_close(torch.tensor(merged["logits"]), torch.tensor(adapted["logits"]), atol=1e-5, rtol=1e-5)
    moved = torch.tensor(merged["logits"]) - torch.tensor(read_as_stranger(base)["logits"])
    assert moved.abs().max() > 1e-3
    assert (tmp_path / "out" / "NOTICE").read_text() == "carry me"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("NOTICE", "config.json", "generation_config.json", "model.safetensors", "README.md", "dfactory.json")
    }
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["block_size"] == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_keeps_the_precision_of_the_base(tmp_path, dtype, capsys):
    base = save_plain(tmp_path / "base", "qwen3", tied=False, dtype=getattr(torch, dtype))
    save_policy(adapted_policy(base, 0.05, dtype), directory := tmp_path / "adapters")
    export(str(directory), str(tmp_path / "out"))
    assert stored_dtype(tmp_path / "out") == getattr(torch, dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype  # the name that the base has
    assert "6 tensors changed" in capsys.readouterr().out


def test_another_precision_is_the_checkpoint_rounded(tmp_path, capsys):
    wide = save_plain(tmp_path / "wide", "qwen3", tied=True)
    export(str(wide), str(tmp_path / "out"), "bfloat16")
    before, after = (load_file(directory / "model.safetensors") for directory in (wide, tmp_path / "out"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "NOTICE").read_text() == "carry me"
    assert "rounded from float32" in capsys.readouterr().out
    assert read_as_stranger(tmp_path / "out")["dtype"] == "torch.bfloat16"


def test_merged_adapters_in_another_precision(tmp_path, capsys):
    """Rounding alone does not count as a change: untrained adapters are refused here too."""
    base = save_plain(tmp_path / "base", "qwen3", tied=False)
    save_policy(adapted_policy(base, 0.05, "float32"), directory := tmp_path / "adapters")
    export(str(directory), str(tmp_path / "out"), "bfloat16")
    assert stored_dtype(tmp_path / "out") == torch.bfloat16
    assert "6 tensors changed" in capsys.readouterr().out
    save_policy(adapted_policy(base, 0.0, "float32"), untrained := tmp_path / "untrained")
    with pytest.raises(CheckpointError, match="equals its base"):
        export(str(untrained), str(tmp_path / "none"), "bfloat16")


def refuse(model: Path, output: Path, message: str, error=CheckpointError):
    """The export fails with this message, and the output's folder holds what it held before."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(error, match=message):
        export(str(model), str(output))
    assert sorted(output.parent.rglob("*")) == before


def test_untrained_adapters_are_refused(tmp_path):
    base = save_plain(tmp_path / "base", "qwen3", tied=True)
    save_policy(adapted_policy(base, 0.0, "float32"), tmp_path / "adapters")
    refuse(tmp_path / "adapters", tmp_path / "out", "equals its base .* untrained")


def test_adapters_that_are_not_a_number_are_refused(tmp_path):
    base = save_plain(tmp_path / "base", "qwen3", tied=True)
    save_policy(adapted_policy(base, float("nan"), "float32"), tmp_path / "adapters")
    refuse(
        tmp_path / "adapters", tmp_path / "out", "q_proj cannot be merged: its adapter holds numbers that are not fin"
    )


# --- LLaDA2 in bfloat16: what is routed, and what a checkpoint keeps in fp32 --------------------------------------------


def bfloat16_base(name: str, directory: Path, router: torch.dtype = torch.bfloat16) -> Path:
    """A golden checkpoint in bfloat16, but for its routers' correction biases and perhaps their weights."""
    directory.mkdir(parents=True)
    save_policy(load_policy(ROOT / "tests/golden" / name, dtype="bfloat16"), directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for tensor in tensors:
        if tensor.endswith("expert_bias"):  # numbers that bfloat16 does not have
            tensors[tensor] += 1e-3 * torch.rand(tensors[tensor].shape, generator=generator)
        if tensor.endswith("gate.weight"):
            tensors[tensor] = tensors[tensor].to(router) * (1 + (router == torch.float32) * 1e-4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ["llada2_tiny", "llada21_tiny"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_bfloat16_merges_of_llada2(tmp_path, name, dtype, scale, capsys):
    """Honest merges pass, however routing flips, and what adapters do not touch is the base's to the last bit."""
    base = bfloat16_base(name, tmp_path / "base", torch.float32)
    save_policy(adapted_policy(base, scale, "bfloat16"), adapters := tmp_path / "adapters")
    export(str(adapters), str(tmp_path / "out"), dtype)
    before, after = (load_file(directory / "model.safetensors") for directory in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key].double(), after[key].double())}
    assert changed == {
        key
        for key in before
        if "query_key_value" in key
        or ("experts." not in key and "down_proj" in key)
        or "shared_experts.down_proj" in key
    }
    wide = torch.float32 if dtype == "float32" else torch.bfloat16
    for key in before:
        assert after[key].dtype == (torch.float32 if key.endswith(("expert_bias", "gate.weight")) else wide), key
    assert len(after["model.layers.1.mlp.gate.expert_bias"].unique()) == 16
    assert f"{len(changed)} tensors changed" in capsys.readouterr().out


def test_merges_in_bfloat16_of_a_float32_llada2_keep_the_correction_bias(tmp_path):
    base = ROOT / "tests/golden/llada2_tiny"
    save_policy(adapted_policy(base, 0.1, "float32"), adapters := tmp_path / "adapters")
    export(str(adapters), str(tmp_path / "out"), "bfloat16")
    before, after = (load_file(directory / "model.safetensors") for directory in (base, tmp_path / "out"))
    bias = "model.layers.1.mlp.gate.expert_bias"
    assert torch.equal(before[bias], after[bias])
    assert after[bias].dtype == torch.float32
    assert all(tensor.dtype == torch.bfloat16 for key, tensor in after.items() if not key.endswith("expert_bias"))


def twice_as_strong(layer) -> torch.Tensor:
    return 2 * adapters_module_product(layer)


adapters_module_product = adapter_module._product


@pytest.mark.parametrize("scale", [0.003, 0.3])
def test_a_wrong_merge_is_refused(tmp_path, monkeypatch, scale):
    """Adapters at double strength, and a copy that is not what was merged, also where the scores hardly move."""
    base = bfloat16_base("llada2_tiny", tmp_path / "base")
    save_policy(adapted_policy(base, scale, "bfloat16"), adapters := tmp_path / "adapters")
    with monkeypatch.context() as patched:
        patched.setattr(adapter_module, "_product", twice_as_strong)
        refuse(adapters, tmp_path / "out", r"the merged weight's outputs are .* away from those of base and adapter")
    write = exporting._write_merged

    def then_spoil(change):
        def spoilt(merged, source, partial, dtype):
            changed = write(merged, source, partial, dtype)
            tensors = load_file(partial / "model.safetensors")
            change(tensors)
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            return changed

        return spoilt

    def one_number(tensors):
        tensors["model.layers.0.attention.query_key_value.weight"][0, 0] += 1

    def the_bias(tensors):
        tensors["model.layers.1.mlp.gate.expert_bias"] = tensors["model.layers.1.mlp.gate.expert_bias"].bfloat16()

    def the_base(tensors):
        tensors |= load_file(base / "model.safetensors")

    for change, said in (
        (one_number, "q_proj.weight of the merged model is not base plus adapter"),
        (the_bias, "expert_bias came back differently from the copy"),
        (the_base, "came back differently from the copy"),
    ):
        monkeypatch.setattr(exporting, "_write_merged", then_spoil(change))
        refuse(adapters, tmp_path / "out", said)


def test_adapters_on_adapters_are_exported_whole(tmp_path, capsys):
    """A run that started from a LoRA run: its base is that run's directory, adapters included."""
    base = save_plain(tmp_path / "base", "qwen3", tied=True)
    save_policy(adapted_policy(base, 0.3, "float32"), first := tmp_path / "first")
    start = load_policy(first, dtype="float32", merged=True)
    second = with_random_adapters(start, 0.3)
    save_policy(second, again := tmp_path / "again")
    assert json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"] == str(first)
    export(str(again), str(tmp_path / "out"))
    probe = probe_batch(96)
    with torch.no_grad():
        expected = second.eval().score(probe).logprob_N
        for directory in (again, tmp_path / "out"):
            found = load_policy(directory, dtype="float32").score(probe).logprob_N
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert "6 tensors changed" in capsys.readouterr().out


def test_a_missing_base_is_named(tmp_path):
    base = save_plain(tmp_path / "base", "qwen3", tied=True)
    save_policy(adapted_policy(base, 0.1, "float32"), tmp_path / "adapters")
    shutil.rmtree(base)
    refuse(tmp_path / "adapters", tmp_path / "out", f"base_model_name_or_path {base}")


def test_a_damaged_checkpoint_is_refused_by_tensor(llama_run, tmp_path):
    damaged = shutil.copytree(llama_run / "checkpoint-1", tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    refuse(damaged, tmp_path / "out", "model.safetensors has .* bytes, the manifest says")
    (damaged / MANIFEST).unlink()
    refuse(damaged, tmp_path / "out", "missing tensor model.norm.weight")


def test_an_occupied_output_is_refused_and_an_empty_one_filled(llama_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    refuse(llama_run, tmp_path / "full", "exists and is not an empty directory", ConfigError)
    refuse(llama_run, tmp_path / "full" / "mine", "exists and is not an empty directory", ConfigError)
    (tmp_path / "empty").mkdir()
    assert export(str(llama_run), str(tmp_path / "empty")) == 0
    assert (tmp_path / "empty" / "config.json").is_file()


def test_no_model_is_refused(tmp_path):
    refuse(tmp_path / "nowhere", tmp_path / "out", "nowhere is not a directory")
    (tmp_path / "bare").mkdir()
    shutil.copyfile(GOLDEN / "config.json", tmp_path / "bare" / "config.json")
    refuse(tmp_path / "bare", tmp_path / "out", "holds neither model.safetensors")


def test_the_probe_is_the_same_every_time():
    first, second = probe_batch(96), probe_batch(96)
    assert torch.equal(first.input_ids_RS, second.input_ids_RS)
    assert 64 < first.num_targets < 8 * 32
