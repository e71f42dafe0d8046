"""Means of checkpoints against the obvious mean, in either expert layout, whole and in shards."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dfactory.errors import CheckpointError
from dfactory.models.adapters import add_adapters
from dfactory.models.headers import weight_files
from dfactory.models.merging import average_adapters, average_weights, check_products
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from tests.models.conftest import GOLDEN_DIR
from tests.models.test_checkpoints import assert_identical, stacked
from tests.reference import read_tensors


@pytest.fixture
def write_checkpoints(tmp_path):
    """Directories of the golden model with noise of the given seeds, in a layout, a precision and shards of a size."""

    def write(seeds, layout="one by one", dtype="float32", max_shard_bytes=5 * 10**9):
        tensors = load_file(GOLDEN_DIR / "llada2_tiny" / "model.safetensors")
        tensors = tensors if layout == "one by one" else stacked(tensors)
        written = []
        for seed in seeds:
            draw = torch.Generator().manual_seed(seed)
            source, directory = tmp_path / f"source-{seed}", tmp_path / f"checkpoint-{seed}"
            source.mkdir()
            directory.mkdir()
            (source / "config.json").write_bytes((GOLDEN_DIR / "llada2_tiny" / "config.json").read_bytes())
            noisy = {name: tensor + torch.randn(tensor.shape, generator=draw) for name, tensor in tensors.items()}
            save_file(noisy, source / "model.safetensors", metadata={"format": "pt"})
            save_policy(load_policy(source, dtype=dtype), directory, max_shard_bytes=max_shard_bytes)
            written.append(directory)
        return written

    return write


def average(directories, tmp_path):
    (tmp_path / "mean").mkdir()
    average_weights(directories, tmp_path / "mean")
    return tmp_path / "mean"


@pytest.mark.parametrize("layout", ["one by one", "stacked"])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 100_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_obvious_mean(write_checkpoints, tmp_path, layout, shard_bytes, dtype):
    sources = write_checkpoints((1, 2, 3), layout, dtype, shard_bytes)
    out = average(sources, tmp_path)
    each = [read_tensors(source) for source in sources]
    wanted = {
        name: ((each[0][name].float() + each[1][name].float() + each[2][name].float()) / 3).to(each[0][name].dtype)
        for name in each[0]
    }
    assert_identical(read_tensors(out), wanted)
    assert (len(weight_files(out)) > 5) == (shard_bytes < 10**9)
    for ours, best in zip(weight_files(out), weight_files(sources[0]), strict=True):
        assert ours.name == best.name
        with safe_open(ours, "pt") as a, safe_open(best, "pt") as b:
            assert list(a.keys()) == list(b.keys())
            assert a.metadata() == b.metadata() == {"format": "pt"}
    indices = [path / "model.safetensors.index.json" for path in (out, sources[0])]
    assert [index.exists() for index in indices] == [shard_bytes < 10**9] * 2
    assert not indices[0].exists() or indices[0].read_bytes() == indices[1].read_bytes()


def test_one_checkpoint_is_itself_byte_by_byte(write_checkpoints, tmp_path):
    (source,) = write_checkpoints((1,), dtype="bfloat16", max_shard_bytes=100_000)
    out = average([source], tmp_path)
    for file in weight_files(source):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_other_shards_than_the_best_do_not_matter(write_checkpoints, tmp_path):
    (first,) = write_checkpoints((1,))
    (second,) = write_checkpoints((2,), max_shard_bytes=100_000)
    out = average([first, second], tmp_path)
    a, b, mean = read_tensors(first), read_tensors(second), load_file(out / "model.safetensors")
    assert all(torch.equal(mean[name], (a[name] + b[name]) / 2) for name in a)


def test_the_mean_of_bfloat16_is_rounded_once(tmp_path):
    """Summed in bfloat16, 1 and 256 and 1 would be 256; a third of that is another number."""
    dirs = []
    for number, value in enumerate((1.0, 256.0, 1.0)):
        (tmp_path / f"c{number}").mkdir()
        save_file({"w": torch.tensor([value], dtype=torch.bfloat16)}, tmp_path / f"c{number}" / "model.safetensors")
        dirs.append(tmp_path / f"c{number}")
    mean = load_file(average(dirs, tmp_path) / "model.safetensors")["w"]
    assert mean.item() == torch.tensor(86.0, dtype=torch.bfloat16).item()


def test_other_tensors_are_refused(write_checkpoints, tmp_path):
    first, second = write_checkpoints((1, 2))
    (stacked_one,) = write_checkpoints((3,), "stacked")
    with pytest.raises(CheckpointError, match=r"experts\..* is missing in .*checkpoint-3|experts\..* is F32 .*missing"):
        average([first, stacked_one], tmp_path)
    tensors = load_file(second / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].bfloat16()}, second / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight is BF16 \[160, 64\] in .*checkpoint-2 and F32"):
        average_weights([first, second], tmp_path / "mean")
    save_file({"step": torch.tensor([3])}, first / "model.safetensors")
    with pytest.raises(CheckpointError, match="checkpoint-1 holds I64 tensors"):
        average_weights([first], tmp_path / "mean")


def test_a_mean_that_is_not_finite_is_refused(write_checkpoints, tmp_path):
    first, second = write_checkpoints((1, 2))
    tensors = load_file(second / "model.safetensors")
    tensors["lm_head.weight"][3, 3] = float("nan")
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mean of lm_head\.weight is not finite"):
        average([first, second], tmp_path)


# --- adapters ---------------------------------------------------------------------------------------------------------


def write_adapters(base, directory, seed):
    policy = add_adapters(load_policy(base, dtype="float32"), r=4, alpha=8, dropout=0.0, target_modules=["q_proj"])
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
    save_policy(policy, directory)
    return directory


def factors(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    names = sorted({name.partition(".lora_")[0] for name in tensors})
    return {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}


def test_adapters_are_averaged_by_their_products(tmp_path):
    sources = [write_adapters(GOLDEN_DIR / "llada2_tiny", tmp_path / f"checkpoint-{s}", s) for s in (1, 2, 3)]
    policy = average_adapters(sources, torch.float32)
    merged = policy.model.merge_and_unload()
    before = load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32").model.state_dict()
    each = [factors(source) for source in sources]
    for name in each[0]:
        wanted = sum(2.0 * f[name][1].double() @ f[name][0].double() for f in each) / 3  # alpha / r = 2
        tensor = f"{name.removeprefix('base_model.model.')}.weight"
        change = merged.state_dict()[tensor].double() - before[tensor].double()
        torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-5)
    assert len(each[0]) == json.loads((GOLDEN_DIR / "llada2_tiny/config.json").read_text())["num_hidden_layers"]


def test_the_check_of_products_sees_a_wrong_mean(tmp_path):
    sources = [write_adapters(GOLDEN_DIR / "llada2_tiny", tmp_path / f"checkpoint-{s}", s) for s in (1, 2)]
    policy = average_adapters(sources, torch.float32)
    assert check_products(policy).difference < 1e-5
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "lora_B.mean" in name).mul_(1.01)
    assert check_products(policy).difference > 1e-2


def test_adapters_of_two_bases_are_refused(tmp_path):
    sources = [write_adapters(GOLDEN_DIR / "llada2_tiny", tmp_path / "checkpoint-1", 1)]
    sources.append(write_adapters(GOLDEN_DIR / "llada21_tiny", tmp_path / "checkpoint-2", 2))
    with pytest.raises(CheckpointError, match="only adapters of one base"):
        average_adapters(sources, torch.float32)
