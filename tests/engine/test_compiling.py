"""`torch_compile`: the losses of the model as it is, the same tensor names, and few graphs."""

from types import SimpleNamespace

import pytest
from safetensors import safe_open

from dfactory.engine.compiling import compile_layers
from dfactory.engine.trainer import deepspeed_config
from dfactory.errors import ConfigError
from dfactory.models.families.base import FAMILIES
from dfactory.recipe import load_recipe
from tests.engine.conftest import read_metrics
from tests.engine.test_equality import ZERO

COMPILED = ["torch_compile=true", "torch_compile_backend=aot_eager"]


@pytest.mark.slow
def test_compiled_layers_compute_the_same(recipe_file, run_jobs, tmp_path):
    """Without ZeRO, and with recomputed activations under ZeRO 2; packed sequences of two lengths."""
    common = ["max_steps=3", "packing=false", "per_device_train_batch_size=2", "max_grad_norm=0.5"]
    recomputed = [*COMPILED, ZERO[2], "gradient_checkpointing=true"]
    jobs = {"plain": [], "compiled": COMPILED, "recomputed": recomputed}
    told = run_jobs(
        1, [(recipe_file, [*common, f"output_dir={tmp_path / name}", *keys]) for name, keys in jobs.items()]
    )
    assert "torch_compile: 2 of 3 layers, by aot_eager at their first use; at most 8 graphs" in told
    assert "recompile_limit" not in told  # or dynamo warns that it has given up
    for name in ("compiled", "recomputed"):
        for metric in ("loss", "grad_norm"):
            expected = pytest.approx(read_metrics(tmp_path / "plain", metric), rel=1e-5)
            assert read_metrics(tmp_path / name, metric) == expected, (name, metric)
        assert tensors(tmp_path / name) == tensors(tmp_path / "plain")


def tensors(run):
    with safe_open(run / "checkpoint-3/model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    "keys, told",
    [
        (["use_peft=true"], "torch_compile true with use_peft true: adapters that are switched off"),
        (["activation_offloading=true"], "torch_compile true with activation_offloading true"),
        (["expert_parallel_size=2"], "torch_compile true with expert_parallel_size 2"),
        (["torch_compile_mode=default"], "torch_compile_mode default with torch_compile_backend aot_eager"),
        (["torch_compile=false", "torch_compile_mode=default"], "torch_compile_mode default with torch_compile false"),
        ([ZERO[3]], "torch_compile true with zero_optimization.stage 3 in .*zero3.json: weights are fetched"),
    ],
)
def test_what_cannot_be_compiled_is_refused(recipe_file, keys, told):
    with pytest.raises(ConfigError, match=told):
        deepspeed_config(load_recipe(recipe_file, [*COMPILED, *keys]))


def test_layers_of_causal_context_are_refused():
    policy = SimpleNamespace(family=FAMILIES["diffusion_gemma"])
    with pytest.raises(
        ConfigError, match="torch_compile true: layers of the model family diffusion_gemma compute views"
    ):
        compile_layers(policy, "aot_eager", None)
