"""Reading and writing model directories: original names in both layouts, refusals that name the tensor, carried files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.hub import resolve
from dfactory.models.registry import load_policy, read_config
from dfactory.models.saving import save_policy
from dfactory.models.tiny import write_tiny_config
from tests.batches import make_batch, random_document
from tests.models.conftest import CONFIGS, GOLDEN_DIR
from tests.reference import batch_scores, read_tensors, reference_model

MODEL_TYPES = ["llada2_moe", "llada21_moe", "llada2_moe_veomni"]


def golden_tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN_DIR / "llada2_tiny" / "model.safetensors")


def stacked(tensors):
    """The layout that holds the experts of a layer in one tensor [E, out, in]."""
    kept, experts = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+_proj)\.weight", name)
        if found:
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = tensor
        else:
            kept[name] = tensor
    return kept | {name: torch.stack([each[e] for e in range(len(each))]) for name, each in experts.items()}


@pytest.fixture
def write_model(tmp_path):
    """Write a directory with the golden config.json (with changes) and these tensors."""

    def write(tensors, name="source", **keys):
        directory = tmp_path / name
        directory.mkdir()
        config = json.loads((GOLDEN_DIR / "llada2_tiny" / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | keys))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return write


def resaved(policy, directory, **options):
    directory.mkdir()
    save_policy(policy, directory, **options)
    return read_tensors(directory)


def assert_identical(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("layout", ["one by one", "stacked"])
def test_either_layout_under_any_name_is_saved_as_it_was_read(write_model, tmp_path, layout, model_type):
    tensors = golden_tensors() if layout == "one by one" else stacked(golden_tensors())
    source = write_model(tensors, model_type=model_type)
    saved = resaved(load_policy(source, dtype="float32"), tmp_path / "out")
    assert_identical(saved, tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_both_layouts_are_the_same_model(write_model):
    batch = make_batch([[random_document(torch.Generator().manual_seed(0), 16, 8, 2, 160, prompt=3)]])
    directories = [
        GOLDEN_DIR / "llada2_tiny",
        write_model(stacked(golden_tensors()), model_type="llada2_moe_veomni"),
    ]
    with torch.no_grad():
        one, two = (load_policy(directory, dtype="float32")(batch).logprob_N for directory in directories)
        assert torch.equal(one, two)
        torch.testing.assert_close(batch_scores(reference_model(directories[1]), batch).logprob, two, atol=5e-5, rtol=0)


def test_shards_hold_the_same_tensors(golden, tmp_path):
    policy = load_policy(golden.directory, dtype="float32")
    tensors = load_file(golden.directory / "model.safetensors")
    out = tmp_path / "out"
    assert_identical(resaved(policy, out, max_shard_bytes=200_000), tensors)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 5
    assert [shard.name for shard in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 200_000 for shard in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert_identical(resaved(load_policy(out, dtype="float32"), tmp_path / "again"), tensors)


def test_an_export_is_read_by_the_reference(golden, tmp_path):
    """Trained a little, saved, read back by plain torch through the original names: the same scores."""
    policy = load_policy(golden.directory, dtype="float32").train()
    batch = make_batch([[random_document(torch.Generator().manual_seed(0), 24, 8, 2, 160, prompt=10)]])
    before = policy(batch).logprob_N
    before.mean().neg().backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
        after = policy(batch).logprob_N
    resaved(policy, tmp_path / "out")
    with torch.no_grad():
        scores = batch_scores(reference_model(tmp_path / "out"), batch)
    torch.testing.assert_close(scores.logprob, after, atol=5e-5, rtol=0)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_drawn_weights_are_saved_in_the_layout_of_their_name(tmp_path, model_type):
    directory = write_tiny_config(tmp_path / "drawn", model_type=model_type)
    policy = load_policy(directory, dtype="float32", init_weights="random", seed=3)
    saved = resaved(policy, tmp_path / "out")
    expert = (
        "model.layers.1.mlp.experts.gate_proj"
        if "veomni" in model_type
        else "model.layers.1.mlp.experts.7.gate_proj.weight"
    )
    assert expert in saved
    assert all(name.startswith(("model.", "lm_head.")) for name in saved)
    assert_identical(resaved(load_policy(tmp_path / "out", dtype="float32"), tmp_path / "again"), saved)

    again = load_policy(directory, dtype="float32", init_weights="random", seed=3)
    assert_identical(dict(again.state_dict()), dict(policy.state_dict()))
    other = load_policy(directory, dtype="float32", init_weights="random", seed=4)
    assert not torch.equal(other.model.lm_head.weight, policy.model.lm_head.weight)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_other_families_load_in_plain_transformers(random_policy, tmp_path, family, tied):
    from transformers import AutoModelForCausalLM

    policy = random_policy(family, tie_word_embeddings=tied)
    out = tmp_path / "out"
    saved = resaved(policy, out)
    assert ("lm_head.weight" in saved) != tied
    if family == "qwen3_moe":
        assert "model.layers.0.mlp.experts.3.down_proj.weight" in saved
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert_identical(dict(plain.state_dict()), dict(policy.model.state_dict()))
    assert_identical(resaved(load_policy(out, dtype="float32"), tmp_path / "again"), saved)


def test_an_export_in_bfloat16_says_so(golden, tmp_path):
    saved = resaved(load_policy(golden.directory, dtype="bfloat16"), tmp_path / "out")
    original = load_file(golden.directory / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in saved.items():
        exact = name.endswith("expert_bias")  # routing compares sums of it: it stays in fp32
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert torch.equal(tensor, original[name] if exact else original[name].bfloat16()), name


@pytest.mark.slow
def test_weights_read_into_zero3_shards_are_saved_as_they_were(write_model, random_policy, tmp_path):
    """Two processes, each with half of every parameter: both LLaDA2 layouts, and a family whose experts are merged."""
    moe = tmp_path / "moe"
    resaved(random_policy("qwen3_moe"), moe)
    sources = [
        GOLDEN_DIR / "llada2_tiny",
        write_model(stacked(golden_tensors()), model_type="llada2_moe_veomni"),
        moe,
        GOLDEN_DIR / "families/llada",
        GOLDEN_DIR / "families/llada_moe",
    ]
    pairs = [(source, tmp_path / f"out{n}") for n, source in enumerate(sources)]
    script = Path(__file__).with_name("zero3_copy.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        [str(part) for part in [*command, *(path for pair in pairs for path in pair)]],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for source, target in pairs:
        assert_identical(read_tensors(target), read_tensors(source))


# --- refusals ---------------------------------------------------------------------------------------------------------


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
QKV = "model.layers.2.attention.query_key_value.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("model.norm.weight"), r"missing tensor model\.norm\.weight \[64\]"),
        (drop(EXPERT), r"missing tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight \[32, 64\]"),
        (drop("model.layers.1.mlp.gate.expert_bias"), r"missing tensor model\.layers\.1\.mlp\.gate\.expert_bias"),
        (drop(QKV), r"missing tensor model\.layers\.2\.attention\.query_key_value\.weight"),
        (put("model.layers.1.mlp.extra.weight", 2), r"unexpected tensor model\.layers\.1\.mlp\.extra\.weight \[2\]"),
        (put("model.layers.46.norm.weight", 2), r"unexpected tensor model\.layers\.46\.norm\.weight"),
        (put(EXPERT.replace(".3.", ".16."), 32, 64), r"unexpected tensor .*experts\.16\.up_proj\.weight \[32, 64\]"),
        (put(EXPERT, 30, 64), r"experts\.3\.up_proj\.weight has shape \[30, 64\], not \[32, 64\]"),
        (put(QKV, 120, 64), r"query_key_value\.weight has shape \[120, 64\], not \[128, 64\]"),
        (put("lm_head.weight", 159, 64), r"lm_head\.weight has shape \[159, 64\], not \[160, 64\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(write_model, change, message):
    tensors = golden_tensors()
    change(tensors)
    directory = write_model(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_policy(directory, dtype="float32")


def test_a_stacked_tensor_that_does_not_fit_is_named(write_model):
    tensors = stacked(golden_tensors())
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name][:15].clone()
    with pytest.raises(CheckpointError, match=r"experts\.down_proj has shape \[15, 64, 32\], not \[16, 64, 32\]"):
        load_policy(write_model(tensors))


def test_a_tensor_that_is_planned_and_never_comes_is_named(golden, tmp_path):
    policy, lost = load_policy(golden.directory, dtype="float32"), "model.norm.weight"
    with pytest.raises(CheckpointError, match=rf"would lack 1 tensors: {lost}"):
        resaved(policy, tmp_path / "out", finish=lambda tensors: {n: t for n, t in tensors.items() if n != lost})


def test_many_problems_are_counted(write_model):
    tensors = {name: tensor for name, tensor in golden_tensors().items() if ".experts." not in name}
    with pytest.raises(CheckpointError, match=r"missing tensor .*; and 88 more$"):  # 2 layers x 16 experts x 3, less 8
        load_policy(write_model(tensors))


def test_broken_and_missing_files_are_named(golden, tmp_path):
    out = tmp_path / "out"
    resaved(load_policy(golden.directory, dtype="float32"), out, max_shard_bytes=300_000)
    first = sorted(out.glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=first.name):
        load_policy(out)
    first.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {first.name}"):
        load_policy(out)
    (out / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not an index"):
        load_policy(out)


def test_directories_that_are_no_models(golden, tmp_path):
    with pytest.raises(CheckpointError, match="not a directory"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_policy(tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"model_type"')
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        load_policy(tmp_path)
    config.write_text('{"model_type": "lada2_moe"}')
    with pytest.raises(ConfigError, match=r"model_type 'lada2_moe' .*llada2_moe, llada21_moe.*models/families/"):
        load_policy(tmp_path)
    shutil.copy(golden.directory / "config.json", config)
    torch.save(load_file(golden.directory / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors.*safetensors only.*init_weights=random"):
        load_policy(tmp_path)


# --- Ling 2.0: LLaDA2's architecture, autoregressive ------------------------------------------------------------------

LING = {"model_type": "bailing_moe", "architectures": ["BailingMoeV2ForCausalLM"]}


def test_ling_is_read_as_llada2_without_its_multi_token_prediction(write_model, tmp_path):
    """The same tensors under Ling's name, and behind the last layer one that predicts a token further."""
    layer = max(int(name.split(".")[2]) for name in golden_tensors() if ".layers." in name) + 1
    further = {f"model.layers.{layer}.{name}.weight": torch.ones(2, 2) for name in ("eh_proj", "mlp.experts.0.up_proj")}
    source = write_model(golden_tensors() | further, **LING, num_nextn_predict_layers=1)
    policy = load_policy(source, dtype="float32")
    batch = make_batch([[random_document(torch.Generator().manual_seed(0), 16, 8, 2, 160, prompt=3)]])
    with torch.no_grad():
        golden = load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32")(batch)
        assert torch.equal(policy(batch).logprob_N, golden.logprob_N)
    assert_identical(resaved(policy, tmp_path / "out"), golden_tensors())
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["model_type"], saved["num_nextn_predict_layers"]) == ("bailing_moe", 0)
    load_policy(tmp_path / "out")


def test_other_tensors_behind_the_last_layer_are_refused(write_model):
    source = write_model(golden_tensors() | {"model.layers.7.mtp.weight": torch.ones(2)}, **LING)
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.7\.mtp\.weight"):
        load_policy(source)


def test_an_older_ling_of_the_same_model_type_is_refused(write_model):
    source = write_model(golden_tensors(), **LING | {"architectures": ["BailingMoeForCausalLM"]})
    with pytest.raises(ConfigError, match=r"\['BailingMoeForCausalLM'\].*only BailingMoeV2ForCausalLM is known"):
        load_policy(source)


def test_rotary_defaults_are_the_familys():
    """A config.json that is silent about rotation means 600000 and one half, not Glm4Moe's own defaults."""
    from dfactory.models.families.llada2 import LLaDA2MoeConfig

    assert LLaDA2MoeConfig().rope_parameters == {
        "rope_type": "default",
        "rope_theta": 600000.0,
        "partial_rotary_factor": 0.5,
    }
    config = read_config(GOLDEN_DIR / "llada2_tiny")
    assert LLaDA2MoeConfig(**config.to_dict()).rope_parameters == config.rope_parameters


# --- what lies beside the weights -------------------------------------------------------------------------------------


def test_code_is_carried_along_and_never_run(write_model, tmp_path):
    """The directory names its own code in auto_map; running any of it would leave a file behind."""
    names = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    source = write_model(golden_tensors(), auto_map=names)
    trace = tmp_path / "executed"
    for file in ("configuration_x.py", "modeling_x.py"):
        (source / file).write_text(f"open({str(trace)!r}, 'w').close()\nclass XConfig: ...\nclass XForCausalLM: ...\n")
    (source / "tokenizer_config.json").write_text('{"chat_template": "é"}')
    (source / "LICENSE").write_text("free")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    (source / "folder").mkdir()

    out = tmp_path / "out"
    resaved(load_policy(source, dtype="float32"), out)
    load_policy(out)
    assert not trace.exists()
    assert sorted(file.name for file in out.iterdir()) == [
        "LICENSE",
        "config.json",
        "configuration_x.py",
        "model.safetensors",
        "modeling_x.py",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "config.json").read_text())["auto_map"] == names
    for name in ("modeling_x.py", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_a_run_folder_is_its_newest_checkpoint(golden, tmp_path):
    (tmp_path / "LATEST").write_text("checkpoint-4\n")
    shutil.copytree(golden.directory, tmp_path / "checkpoint-4")
    assert resolve(tmp_path) == tmp_path / "checkpoint-4"
    load_policy(tmp_path)


def test_only_the_writer_touches_the_disk(golden, tmp_path):
    policy = load_policy(golden.directory, dtype="float32")
    gathered = []

    class Gather:
        def __init__(self, parameters):
            gathered.extend(parameters)

        def __enter__(self): ...

        def __exit__(self, *problem): ...

    save_policy(policy, tmp_path / "never", gathered=Gather, write=False)
    assert not (tmp_path / "never").exists()
    assert {id(p) for p in gathered} == {id(p) for p in policy.parameters()}
    assert len(gathered) == len(list(policy.parameters()))
