"""With the experts of a layer on two ranks: the same losses, norms and checkpoints as with all of them on each."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dfactory.engine.checkpoint import needs_universal
from dfactory.engine.expert_parallel import check_ranks
from dfactory.engine.trainer import deepspeed_config
from dfactory.errors import CheckpointError, ConfigError
from dfactory.planning.memory import Setup, count_parameters, forecast
from dfactory.recipe import load_recipe
from tests.engine.conftest import GOLDEN, read_metrics
from tests.engine.test_equality import ZERO
from tests.models.conftest import CONFIGS
from tests.planning.test_memory import MINI

SOFTMAX = GOLDEN.parent / "families/llada_moe"  # its router is a softmax, not renormalised, in the model's precision
STAGES = (1, 2, 3)
SHARED = "expert_parallel_size=2"


@pytest.fixture(scope="module")
def runs(recipe_file, run_jobs, tmp_path_factory):
    """Six steps on two processes, saved at the fourth too; "resumed" ones start from there."""
    folder = tmp_path_factory.mktemp("expert_parallel")
    bf16 = ["dtype=bfloat16", ZERO[3], "gradient_checkpointing=true", "max_steps=2", "eval_noise_levels=[0.5]"]
    options = {"plain": [ZERO[1]], "plain_bf16": bf16, "shared_bf16": [*bf16, SHARED]}
    options |= {f"shared{stage}": [ZERO[stage], SHARED] for stage in STAGES}
    softmax = [f"model_name_or_path={SOFTMAX}", "block_size=null", "mask_token_id=286", "eos_token_id=283"]
    softmax += ["loss_weight=elbo", "noise_level=document", "complementary=false"]
    options |= {"softmax": [*softmax, ZERO[1]], "softmax_bf16": [*softmax, *bf16]}
    options["softmax_shared"] = [*softmax, ZERO[3], SHARED]
    options["softmax_shared_bf16"] = [*options["softmax_bf16"], SHARED]
    for stage in (1, 3):
        options[f"resumed{stage}"] = [
            *options[f"shared{stage}"],
            f"resume_from_checkpoint={folder}/shared{stage}/checkpoint-4",
        ]
    base = ["max_steps=6", "save_steps=4", "warmup_steps=0", "max_grad_norm=1.0", "eval_noise_levels=[0.3,0.7]"]
    base += ["per_device_train_batch_size=2", "gradient_accumulation_steps=2"]
    jobs = [(recipe_file, [*base, f"output_dir={folder / name}", *keys]) for name, keys in options.items()]
    run_jobs(2, jobs)
    return {name: folder / name for name in options}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_training_is_the_same(runs, stage):
    """The norm matters by itself: Adam would not show experts' gradients that are too large by a factor."""
    for metric in ("loss", "eval/loss"):
        expected, got = (read_metrics(runs[name], metric) for name in ("plain", f"shared{stage}"))
        assert got == pytest.approx(expected, abs=1e-5)
    expected, got = (read_metrics(runs[name], "grad_norm") for name in ("plain", f"shared{stage}"))
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoint_has_the_original_tensors(runs, stage):
    expected, got = (load_file(runs[name] / "checkpoint-6/model.safetensors") for name in ("plain", f"shared{stage}"))
    assert got.keys() == expected.keys() == load_file(GOLDEN / "model.safetensors").keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
def test_bf16_routes_in_fp32(runs):
    """AutoEP by itself routes in bf16: then already the first loss is off by 2e-4, and its norm by 4e-3."""
    expected, got = (read_metrics(runs[name]) for name in ("plain_bf16", "shared_bf16"))
    assert got[0] == pytest.approx(expected[0], abs=1e-5)
    assert got == pytest.approx(expected, rel=1e-2)
    norms = [read_metrics(runs[name], "grad_norm")[0] for name in ("plain_bf16", "shared_bf16")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    weights = load_file(runs["shared_bf16"] / "checkpoint-2/model.safetensors")
    assert weights["model.layers.1.mlp.gate.expert_bias"].dtype == torch.float32
    assert weights["model.layers.1.mlp.experts.0.gate_proj.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_experts_that_a_softmax_chooses(runs):
    """Another family of experts, with full attention: the same losses, norms and tensors."""
    names = ("softmax", "softmax_shared")
    for metric, tolerance in (("loss", {"abs": 1e-5, "rel": 1e-6}), ("grad_norm", {"rel": 1e-5})):
        expected, got = (read_metrics(runs[name], metric) for name in names)
        assert got == pytest.approx(expected, **tolerance)
    expected, got = (load_file(runs[name] / "checkpoint-6/model.safetensors") for name in names)
    assert got.keys() == expected.keys() == load_file(SOFTMAX / "model.safetensors").keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=5e-5, msg=name)


@pytest.mark.slow
def test_bf16_routes_in_bf16_where_the_family_does(runs):
    expected, got = (read_metrics(runs[name]) for name in ("softmax_bf16", "softmax_shared_bf16"))
    assert got == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_resumed_is_bitwise_the_undisturbed_run(runs, stage):
    whole, resumed = runs[f"shared{stage}"], runs[f"resumed{stage}"]
    assert read_metrics(resumed) == read_metrics(whole)[4:]
    last = Path("checkpoint-6/model.safetensors")
    assert (resumed / last).read_bytes() == (whole / last).read_bytes()


def test_a_resume_in_another_shape_is_refused(tmp_path):
    (tmp_path / "engine").mkdir()
    state = {"world_size": 4, "zero_stage": 3, "expert_parallel_size": 2}
    (tmp_path / "engine/state.json").write_text(json.dumps(state))
    assert not needs_universal(tmp_path, 3, 4, 2)
    with pytest.raises(CheckpointError, match=r"expert_parallel_size 2, the recipe has 1"):
        needs_universal(tmp_path, 3, 4, 1)
    with pytest.raises(CheckpointError, match=r"on 4 ranks, there are 2 now, and with expert_parallel_size 2"):
        needs_universal(tmp_path, 3, 2, 2)


def test_what_cannot_share_experts_is_refused(recipe_file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3"]))
    plain_experts = tmp_path / "experts.json"
    plain_experts.write_text(json.dumps({"expert_parallel": {"enabled": True, "autoep_size": 2}}))
    stage0 = tmp_path / "zero0.json"
    stage0.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    for keys, message in [
        ([SHARED, f"model_name_or_path={tmp_path}"], "expert_parallel_size 2: model_type qwen3 has no experts"),
        ([SHARED, "use_peft=true"], "expert_parallel_size 2 with use_peft"),
        (["expert_parallel_size=3"], "expert_parallel_size 3 does not divide the 16 experts"),
        ([SHARED, f"deepspeed={stage0}"], "stage 0 in .* with expert_parallel_size 2"),
        ([f"deepspeed={plain_experts}"], "expert_parallel.enabled True in .* against False by the recipe"),
    ]:
        with pytest.raises(ConfigError, match=message):
            deepspeed_config(load_recipe(recipe_file, keys))
    with pytest.raises(ConfigError, match=r"expert_parallel_size 2 does not divide the 3 rank\(s\)"):
        check_ranks(load_recipe(recipe_file, [SHARED]), world_size=3)


def test_stage_1_is_the_default_with_shared_experts(recipe_file):
    keys = yaml.safe_load(recipe_file.read_text())
    assert keys["dtype"] == "float32"
    assert deepspeed_config(load_recipe(recipe_file, [SHARED]))["zero_optimization"]["stage"] == 1


def test_forecast_divides_the_experts():
    """15.3 B of mini's 16.3 B parameters are experts: what ZeRO does not divide, eight ranks now share."""
    counts = count_parameters(MINI)
    own = counts.total - counts.experts + counts.experts // 8

    def lines(stage: int, size: int) -> dict[str, int]:
        found = forecast(MINI, Setup(world_size=16, zero_stage=stage, expert_parallel_size=size))
        return {line.name: line.bytes for line in found.lines}

    one, three = lines(1, 8), lines(3, 8)
    assert (one["weights"], one["gradients"]) == (2 * own, 2 * own)
    assert one["optimiser"] == lines(1, 1)["optimiser"]
    assert three["weights"] == lines(3, 1)["weights"]
    block = counts.largest_block - counts.block_experts * 7 // 8
    assert counts.block_experts == 256 * 3 * 2048 * 512
    assert three["gradients of a block"] == 2 * 2 * block
