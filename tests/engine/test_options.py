"""Every engine option does what its key says, in real runs of a few steps."""

import json
import math

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import get_scheduler

from dfactory.engine.schedule import learning_rate_schedule
from dfactory.recipe import load_recipe
from tests.engine.conftest import GOLDEN, read_metrics
from tests.engine.test_equality import ZERO


def _rates(recipe_file, *overrides: str) -> list[float]:
    recipe = load_recipe(recipe_file, ["learning_rate=1.0", *overrides])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule = learning_rate_schedule(recipe, optimizer, num_steps=10)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_learning_rate_schedules(recipe_file):
    """A run of 10 steps; the eleventh number is what a step beyond its end would have."""
    linear = _rates(recipe_file, "lr_scheduler_type=linear", "warmup_steps=2", "lr_min=0.3")
    assert linear == pytest.approx([0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.3])
    to_zero = _rates(recipe_file, "lr_scheduler_type=linear", "warmup_steps=2")
    assert to_zero == pytest.approx([0, 0.5, *(step / 8 for step in range(8, -1, -1))])
    cosine = _rates(recipe_file, "lr_scheduler_type=cosine", "warmup_steps=1", "lr_min=0.2")
    assert cosine[:2] == pytest.approx([0, 1])
    assert cosine[5] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert _rates(recipe_file, "lr_scheduler_type=constant", "warmup_steps=2") == pytest.approx([0, 0.5] + [1] * 9)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("low", [1e-6, 0.2, 1.0])
@pytest.mark.parametrize("warmup", [0, 2, 8])
def test_the_last_step_has_lr_min(recipe_file, shape, low, warmup):
    rates = _rates(recipe_file, f"lr_scheduler_type={shape}", f"warmup_steps={warmup}", f"lr_min={low}")
    assert rates[warmup] == pytest.approx(1)
    assert rates[9] == pytest.approx(low)
    assert min(rates[warmup:10]) == pytest.approx(low)


@pytest.mark.parametrize("low", [0.0, 0.3])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_are_those_of_transformers(recipe_file, warmup, low):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    end = 10 - (low > 0)
    theirs = {
        "cosine": get_scheduler(
            "cosine_with_min_lr", optimizer, warmup, end, scheduler_specific_kwargs={"min_lr": low}
        ),
        "linear": get_scheduler(
            "polynomial", optimizer, warmup, end, scheduler_specific_kwargs={"lr_end": low, "power": 1.0}
        ),
        "constant": get_scheduler("constant_with_warmup", optimizer, warmup, end),
    }
    for shape, schedule in theirs.items():
        rates = _rates(recipe_file, f"lr_scheduler_type={shape}", f"warmup_steps={warmup}", f"lr_min={low}")
        assert rates == [schedule.lr_lambdas[0](step) for step in range(11)], shape


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_a_learning_rate_of_zero(recipe_file, shape):
    assert _rates(recipe_file, f"lr_scheduler_type={shape}", "learning_rate=0", "warmup_steps=2") == [0] * 11


def test_a_warmup_as_a_share_of_the_run(recipe_file):
    share = _rates(recipe_file, "lr_scheduler_type=constant", "warmup_steps=0.4")
    assert share == _rates(recipe_file, "lr_scheduler_type=constant", "warmup_steps=4")


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [10, 20])
def test_a_warmup_of_the_whole_run(recipe_file, shape, warmup):
    rates = _rates(recipe_file, f"lr_scheduler_type={shape}", f"warmup_steps={warmup}")
    assert rates == pytest.approx([step / warmup for step in range(11)])


GENTLY = "learning_rate=5e-4"  # at 1e-3 the rounding of four steps adds up, by 2 percent on a CPU without AMX


@pytest.fixture(scope="module")
def runs(recipe_file, run_jobs, tmp_path_factory):
    """Short runs, one after another in one process; runs["name"] is the folder."""
    folder = tmp_path_factory.mktemp("options")
    options = {
        "plain": [],
        "checkpointing": ["gradient_checkpointing=true"],
        "budget": ["gradient_checkpointing=true", "activation_memory_gb=0.002"],
        "dense": ["attn_implementation=dense"],
        "clipped": ["max_grad_norm=0.001"],
        "unclipped": ["max_grad_norm=0"],
        "gentle": [GENTLY],
        "bf16": ["dtype=bfloat16", ZERO[1], GENTLY],
        "bf16_default": ["dtype=bfloat16", GENTLY],
        "bf16_zero3": ["dtype=bfloat16", ZERO[3], "gradient_checkpointing=true", GENTLY],
        "lora": ["use_peft=true", "lora_r=4", "lora_alpha=8", "lora_dropout=0.1"],
        "lora_zero3": ["use_peft=true", "lora_r=4", "lora_alpha=8", ZERO[3]],
        "unpacked": ["packing=false", "complementary=false", "num_views=2", "stratified=true"],
        "tracked": ["report_to=[wandb]", "run_name=tracked", "eval_steps=2", "eval_noise_levels=[0.25,0.75]"],
        "epochs": ["max_steps=null", "num_train_epochs=1.5", "per_device_train_batch_size=2"],
    }
    base = ["max_steps=4", "warmup_steps=0", "per_device_train_batch_size=2"]
    jobs = [(recipe_file, [*base, f"output_dir={folder / name}", *keys]) for name, keys in options.items()]
    run_jobs(1, jobs)
    return {name: folder / name for name in options}


@pytest.mark.slow
def test_recomputing_and_another_attention_change_nothing(runs):
    for name in ("checkpointing", "budget", "dense"):
        assert read_metrics(runs[name]) == pytest.approx(read_metrics(runs["plain"]), abs=1e-5)


@pytest.mark.slow
def test_clipping(runs):
    """The norm that is logged is the one before clipping; what follows the first step differs."""
    plain, clipped, unclipped = (read_metrics(runs[name], "grad_norm") for name in ("plain", "clipped", "unclipped"))
    assert plain[0] == pytest.approx(clipped[0], rel=1e-5)
    assert plain[0] == pytest.approx(unclipped[0], rel=1e-5)
    assert plain[0] > 1
    assert read_metrics(runs["clipped"])[-1] != pytest.approx(read_metrics(runs["plain"])[-1], abs=1e-6)


@pytest.mark.slow
def test_bf16_follows_fp32(runs):
    expected = read_metrics(runs["gentle"])
    for name in ("bf16", "bf16_default", "bf16_zero3"):
        assert read_metrics(runs[name]) == pytest.approx(expected, rel=0.02), name
        weights = load_file(runs[name] / "checkpoint-4/model.safetensors")
        assert weights["lm_head.weight"].dtype == torch.bfloat16
        assert weights["model.layers.1.mlp.gate.expert_bias"].dtype == torch.float32  # routing stays exact
        assert json.loads((runs[name] / "checkpoint-4/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_lora_trains_adapters_only(runs):
    for name in ("lora", "lora_zero3"):
        saved = load_file(runs[name] / "checkpoint-4/adapter_model.safetensors")
        assert all("lora_" in key for key in saved)
        assert any(tensor.abs().sum() > 0 for key, tensor in saved.items() if "lora_B" in key)
        assert not (runs[name] / "checkpoint-4/model.safetensors").exists()
        base = json.loads((runs[name] / "checkpoint-4/adapter_config.json").read_text())["base_model_name_or_path"]
        assert base == str(GOLDEN)


@pytest.mark.slow
def test_evaluation_grid_and_tracker(runs):
    rows = [json.loads(line) for line in (runs["tracked"] / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    assert {"eval/loss_t0.25", "eval/hit_rate_t0.75"} <= evaluations[0].keys()
    assert (runs["tracked"] / "wandb").is_dir()
    assert len(list((runs["tracked"] / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


@pytest.mark.slow
def test_the_resolved_recipe_is_a_recipe(runs):
    keys = OmegaConf.load(runs["bf16"] / "config.yaml")
    assert keys.dtype == "bfloat16"
    assert load_recipe(runs["bf16"] / "config.yaml").max_steps == 4


@pytest.mark.slow
def test_epochs_give_the_steps(runs, recipe_file):
    """40 documents, one and a half times: the last window is filled up with empty rows, not dropped."""
    rows = [json.loads(line) for line in (runs["epochs"] / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert steps[-1]["epoch"] == pytest.approx(1.5, abs=0.02)
    state = json.loads((runs["epochs"] / f"checkpoint-{len(steps)}/engine/state.json").read_text())
    assert state["step"] == len(steps)
    assert state["targets"] == sum(row["targets"] for row in steps)
    responses = [len(row["input_ids"]) - row["prompt_lengths"] for row in _records(recipe_file)]
    assert state["targets"] >= 1.4 * sum(responses)  # a pair scores every response token once a visit


def _records(recipe_file) -> list[dict]:
    data = yaml.safe_load(recipe_file.read_text())["datasets"][0]["path"]
    with open(data) as file:
        return [json.loads(line) for line in file]
