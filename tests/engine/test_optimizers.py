"""Optimisers by name, parameter groups, frozen weights and the moving average, in real runs of a few steps on DeepSpeed;
each is resumed to the same weights."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from dfactory.engine.trainer import deepspeed_config
from dfactory.errors import ConfigError
from dfactory.models.freezing import freeze
from dfactory.recipe import load_recipe
from tests.engine.conftest import GOLDEN, read_metrics
from tests.engine.test_equality import ZERO

BASE = ["warmup_steps=0", "lr_scheduler_type=constant", "eval_datasets=[]", "max_steps=4"]
RESUMED = {  # each runs 4 steps, and 2 and 2
    "adafactor": ["optim=adafactor", ZERO[0], "learning_rate=0.01"],
    "adamw_8bit": ["optim=adamw_8bit", ZERO[1]],
    "muon": ["optim=muon", ZERO[2], "max_grad_norm=0", "muon_learning_rate=0.02"],
    "frozen": ["frozen_parameters=[embed_tokens,'layers\\.0\\.']", ZERO[1], "embedding_learning_rate=0.1"],
    "average": ["ema_decay=0.5", ZERO[1], "dtype=bfloat16"],
    "average_zero3": ["ema_decay=0.5", ZERO[3], "frozen_parameters=[input_layernorm]"],
}
ONCE = {
    "plain": ["save_steps=1"],
    "average_plain": ["ema_decay=0.5", "save_steps=1"],
    "embeddings": ["learning_rate=0", "embedding_learning_rate=0.01"],
    "embeddings_zero3": ["learning_rate=0", "embedding_learning_rate=0.01", ZERO[3]],
}


if find_spec("bitsandbytes") is None:
    RESUMED["adamw_8bit"] = None


@pytest.fixture(scope="module")
def runs(recipe_file, run_jobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    jobs = [
        (recipe_file, [*BASE, f"output_dir={folder / name}", *keys]) for name, keys in (ONCE | RESUMED).items() if keys
    ]
    for name, keys in RESUMED.items():
        if keys is None:
            continue
        again = [*BASE, *keys, f"output_dir={folder / name}_again"]
        jobs += [(recipe_file, [*again, "max_steps=2"]), (recipe_file, [*again, "resume_from_checkpoint=true"])]
    run_jobs(1, jobs)
    return {path.name: path for path in folder.iterdir()}


def _weights(run, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}/model.safetensors")


def _changed(run) -> set[str]:
    before, after = load_file(GOLDEN / "model.safetensors"), _weights(run)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_same_weights(runs, name):
    if RESUMED[name] is None:
        pytest.skip("bitsandbytes is not installed")
    metrics, again = read_metrics(runs[name]), read_metrics(runs[f"{name}_again"])
    if name == "muon":  # DeepSpeed orthogonalises in bfloat16: two runs differ from their first step on, by 6e-6
        assert again == pytest.approx(metrics, rel=1e-3)
    else:
        expected, found = _weights(runs[name]), _weights(runs[f"{name}_again"])
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        assert metrics == again
    assert _changed(runs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embeddings", "embeddings_zero3"])
def test_embedding_and_head_have_their_own_rate(runs, name):
    assert _changed(runs[name]) == {"model.word_embeddings.weight", "lm_head.weight"}
    assert read_metrics(runs[name], "learning_rate") == [0.0] * 4  # of the others


@pytest.mark.slow
def test_frozen_weights_stay(runs):
    changed = _changed(runs["frozen"])
    assert "lm_head.weight" in changed
    assert any(".layers.1." in name for name in changed)
    assert not [name for name in changed if "word_embeddings" in name or ".layers.0." in name]


@pytest.mark.slow
def test_the_average_is_saved_in_place_of_the_weights(runs):
    expected = load_file(GOLDEN / "model.safetensors")
    for step in (1, 2, 3, 4):
        weights = _weights(runs["plain"], step)
        expected = {name: torch.lerp(expected[name].float(), weights[name].float(), 0.5) for name in expected}
        found = _weights(runs["average_plain"], step)
        assert all(torch.allclose(found[name].float(), expected[name], atol=1e-6) for name in expected)
    assert read_metrics(runs["plain"]) == read_metrics(runs["average_plain"])  # training goes on with the weights


@pytest.mark.slow
def test_muon_takes_orthogonal_steps(runs, recipe_file):
    """Of hidden matrices: the singular values of two steps at 0.02 are 0.04 at most, up to what Newton-Schulz leaves."""
    before, after = load_file(GOLDEN / "model.safetensors"), _weights(runs["muon_again"], 2)
    name = next(name for name in before if "layers.1" in name and "dense.weight" in name)
    values = torch.linalg.svdvals((after[name] - before[name]).float())
    assert values.max() < 0.04 * 1.25
    assert values.median() > 0.02
    assert read_metrics(runs["muon"], "learning_rate") == [1e-3] * 4


@pytest.mark.slow
def test_what_the_optimisers_keep(runs):
    def state(run):
        files = sorted((run / "checkpoint-4/engine/shards").glob("*optim_states.pt")) or sorted(
            (run / "checkpoint-4/engine/shards").glob("*model_states.pt")
        )
        return str(torch.load(files[0], weights_only=False).keys()), torch.load(files[0], weights_only=False)

    adafactor = state(runs["adafactor"])[1]["optimizer"]["state"]
    assert any("row_var" in one for one in adafactor.values())
    if RESUMED["adamw_8bit"] is not None:  # bitsandbytes is installed
        eight = state(runs["adamw_8bit"])[1]["optimizer_state_dict"]["base_optimizer_state"]["state"]
        assert next(iter(eight.values()))["state1"].dtype == torch.uint8


STAGE = "deepspeed_overrides={{zero_optimization: {{stage: {}}}}}".format


@pytest.mark.parametrize(
    "keys, told",
    [
        (["optim=adafactor", STAGE(1)], "optim adafactor with zero_optimization.stage 1: its shards are flat"),
        (["optim=adafactor", "dtype=bfloat16"], "use dtype float32 with stage 0"),
        (["optim=muon"], "optim muon with zero_optimization.stage 0: nothing would skip a step with a NaN"),
        (["optim=muon", STAGE(2)], "optim muon with max_grad_norm 1: DeepSpeed would clip the orthogonalised update"),
        (["muon_learning_rate=0.1"], "muon_learning_rate 0.1 with optim adamw"),
        (["frozen_parameters=['(']"], "is no regular expression"),
        (["frozen_parameters=[x]", "use_peft=true"], "frozen_parameters with use_peft true"),
        (["optim=muon", STAGE(2), "embedding_max_grad_norm=1", "max_grad_norm=0"], "its momentum is in the gradients"),
        (
            [
                "embedding_max_grad_norm=1",
                "deepspeed_overrides={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}",
            ],
            "embedding_max_grad_norm 1 with zero_optimization.offload_optimizer",
        ),
        (["embedding_max_grad_norm=0.1", "use_peft=true"], "embedding_max_grad_norm 0.1 with use_peft true"),
        (["embedding_learning_rate=0.1", "use_peft=true"], "embedding_learning_rate 0.1 with use_peft true"),
        (["ema_decay=0.9", "expert_parallel_size=2"], "ema_decay 0.9 with expert_parallel_size 2"),
        (
            ["ema_decay=0.9", "deepspeed_overrides={zero_optimization: {stage: 3, offload_param: {device: cpu}}}"],
            "ema_decay 0.9 with zero_optimization.offload_param",
        ),
        (
            [
                "optim=adamw_8bit",
                "deepspeed_overrides={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}",
            ],
            "optim adamw_8bit with offload_optimizer",
        ),
    ],
)
def test_what_would_not_be_right_is_refused(recipe_file, keys, told):
    with pytest.raises(ConfigError, match=told):
        deepspeed_config(load_recipe(recipe_file, keys))


def test_patterns_of_frozen_weights():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 2), "norm": torch.nn.LayerNorm(2)})
    assert freeze(model, ["embed"]) == 4
    assert not model["embed"].weight.requires_grad
    with pytest.raises(
        ConfigError, match="frozen_parameters 'head' finds no parameter: the model has names such as embed"
    ):
        freeze(model, ["head"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(model, ["."])


def test_the_configuration_of_adamw_is_as_before(recipe_file):
    section = deepspeed_config(load_recipe(recipe_file))["optimizer"]
    assert section["type"] == "AdamW"
    assert json.dumps(section["params"], sort_keys=True) == json.dumps(
        {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True, "fused": True},
        sort_keys=True,
    )
