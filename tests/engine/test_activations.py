"""activation_memory_gb keeps the activations of the last layers that fit; activation_offloading needs a GPU."""

import contextlib
import dataclasses
import json

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from dfactory.engine.activations import kept_note, offloading, recompute
from dfactory.errors import ConfigError
from dfactory.models.attention import MaskPlan
from dfactory.models.registry import load_policy, read_config
from dfactory.planning.memory import Setup, forecast, layers_kept
from dfactory.recipe import load_recipe
from tests.engine.conftest import GOLDEN
from tests.models.conftest import CONFIGS
from tests.planning.test_memory import KeptForBackward

LAYERS, LENGTH = 6, 200


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    config = CONFIGS["qwen3"] | sizes | {"num_hidden_layers": LAYERS, "intermediate_size": 144}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def setup(**keys):
    return Setup(world_size=1, dtype="float32", gradient_checkpointing=True, row_length=LENGTH, **keys)


def kept_bytes(directory, kept):
    """What autograd keeps of a forward pass, and the gradient of the embedding."""
    policy = load_policy(directory, dtype="float32", init_weights="random", attn_implementation="dense").train()
    recompute(policy.model, kept)
    tokens, places = torch.arange(LENGTH)[None] % 90, torch.arange(LENGTH)[None]
    everything = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool)
    keeper = KeptForBackward(policy, LENGTH)
    with keeper:
        hidden = policy.hidden(tokens, places, MaskPlan(everything))
    hidden.square().mean().backward()
    return keeper.bytes, policy.model.get_input_embeddings().weight.grad


def test_a_budget_is_kept_and_used(directory):
    """The forecast of each number of layers is what autograd keeps, within a tenth, and a budget of so much gives that
    number. Gradients are equal."""
    config = read_config(directory)
    bytes_of, gradients = zip(*(kept_bytes(directory, kept) for kept in range(LAYERS + 1)), strict=True)
    outside = bytes_of[0] - LAYERS * LENGTH * 4 * config.hidden_size  # the last norm, and rotary embeddings
    for kept in range(1, LAYERS + 1):
        whole = setup(activation_bytes=0)
        lines = {line.name: line.bytes for line in forecast(directory, at_budget(config, whole, kept)).lines}
        expected = lines.get("layer inputs", 0) + lines["activations"]
        assert bytes_of[kept] - outside == pytest.approx(expected, rel=0.1), kept
        torch.testing.assert_close(gradients[kept], gradients[0])


def at_budget(config, whole, kept):
    """The smallest budget, in steps of a kilobyte, that keeps so many layers."""
    budget = next(
        size
        for size in range(0, 10**9, 1000)
        if layers_kept(config, dataclasses.replace(whole, activation_bytes=size)) == kept
    )
    return dataclasses.replace(whole, activation_bytes=budget)


def test_without_a_budget_all_or_none(directory):
    config = read_config(directory)
    assert layers_kept(config, setup()) == 0
    assert layers_kept(config, dataclasses.replace(setup(), gradient_checkpointing=False)) == LAYERS
    assert layers_kept(config, setup(activation_bytes=10**12)) == LAYERS


def test_the_last_layers_keep_theirs(directory):
    policy = load_policy(directory, dtype="float32", init_weights="random")
    recompute(policy.model, 2)
    layers = [module for module in policy.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == [True] * 4 + [False] * 2


def recipe(recipe_file, *keys):
    return load_recipe(recipe_file, list(keys))


def test_what_a_run_tells(recipe_file):
    budget = recipe(recipe_file, "gradient_checkpointing=true", "activation_memory_gb=1.5")
    assert "those of the last 2 of 6 layers; the others recompute" in kept_note(budget, 2, 6)
    assert "none of the 6 layers: all recompute" in kept_note(budget, 0, 6)
    assert "all 6 layers: none is recomputed" in kept_note(budget, 6, 6)
    assert kept_note(recipe(recipe_file, "gradient_checkpointing=true"), 0, 6) == ""


def test_a_budget_needs_recomputing(recipe_file):
    with pytest.raises(ConfigError, match=r"activation_memory_gb 1\.0 needs gradient_checkpointing"):
        recipe(recipe_file, "activation_memory_gb=1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offloading_is_refused_without_a_gpu():
    with pytest.raises(ConfigError, match="activation_offloading true needs a CUDA device"):
        offloading()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_changes_no_gradient():
    def gradient(context):
        policy = load_policy(GOLDEN, dtype="float32").train().cuda()
        recompute(policy.model, 0)
        tokens = torch.arange(64, device="cuda")[None]
        with context:
            hidden = policy.hidden(tokens, tokens, MaskPlan(torch.ones(1, 64, 64, dtype=torch.bool, device="cuda")))
        hidden.square().mean().backward()
        return policy.model.get_input_embeddings().weight.grad

    torch.testing.assert_close(gradient(offloading()), gradient(contextlib.nullcontext()))
