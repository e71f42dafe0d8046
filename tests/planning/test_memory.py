"""Parameter counts of the public configurations, ZeRO's division on a case done by hand, activations as measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dfactory import assembly
from dfactory.config.owners import key_names
from dfactory.models import attention, norms
from dfactory.models.adapters import add_adapters
from dfactory.models.attention import MaskPlan
from dfactory.models.registry import load_policy, read_config
from dfactory.models.tiny import write_tiny_config
from dfactory.planning.memory import (
    Phase,
    Setup,
    count_adapters,
    count_parameters,
    forecast,
    layer_activations,
    setup_of,
)
from dfactory.recipe import STAGES, load_recipe
from tests.models.conftest import CONFIGS, GOLDEN_DIR

RECIPES = Path(__file__).parents[2] / "recipes"
MINI, FLASH = RECIPES / "llada2_mini" / "model", RECIPES / "llada2_flash" / "model"


def test_the_public_configurations_are_16_and_100_billion():
    """Also what the models' names say: mini is 16B with 1.4B active, flash 100B with 6.1B active."""
    mini, flash = count_parameters(MINI), count_parameters(FLASH)
    assert mini.total == 16_255_638_528
    assert flash.total == 102_889_697_280
    assert mini.active == pytest.approx(1.4e9, rel=0.03)
    assert flash.active == pytest.approx(6.1e9, rel=0.02)


def test_the_parts_of_mini_by_hand():
    counts = count_parameters(MINI)
    assert counts.vocabulary == 2 * 157_184 * 2048
    assert counts.experts == 19 * 256 * 3 * 2048 * 512  # layer 0 is dense
    attention = 2048 * (16 + 4 + 4) * 128 + 16 * 128 * 2048 + 2 * 128
    norms = 20 * 2 * 2048 + 2048
    shared_and_router = 19 * (3 * 2048 * 512 + 256 * 2048)
    assert counts.other == 20 * attention + norms + shared_and_router + 3 * 2048 * 5120
    assert counts.largest_block == 256 * 3 * 2048 * 512 + 3 * 2048 * 512 + 256 * 2048


def test_the_golden_model_is_counted_as_it_is():
    policy = load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32")
    assert count_parameters(GOLDEN_DIR / "llada2_tiny").total == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_other_families_are_counted_too(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    policy = load_policy(tmp_path, dtype="float32", init_weights="random")
    counts = count_parameters(tmp_path)
    assert counts.total == sum(p.numel() for p in policy.parameters())
    assert counts.vocabulary == 2 * 96 * 32
    assert counts.experts == (2 * 4 * 3 * 32 * 16 if family == "qwen3_moe" else 0)
    assert counts.total - counts.active == counts.experts // 2  # 2 of 4 experts a token
    forecast(tmp_path, Setup(world_size=2, zero_stage=3))


def gigabytes(setup, *names):
    lines = {line.name: line for line in forecast(MINI, setup).lines}
    return [lines[name].bytes / 1e9 for name in names]


@pytest.mark.parametrize(
    "stage, weights, gradients, optimiser",
    [  # 16.2556 B parameters: 2 P = 32.511, 12 P = 195.068; an eighth of them 4.064 and 24.383
        (0, 32.511, 32.511, 195.068),
        (1, 32.511, 32.511, 24.383),
        (2, 32.511, 4.064, 24.383),
        (3, 4.064, 4.064, 24.383),
    ],
)
def test_zero_on_eight_ranks_in_bfloat16(stage, weights, gradients, optimiser):
    got = gigabytes(Setup(world_size=8, zero_stage=stage), "weights", "gradients", "optimiser")
    assert got == pytest.approx([weights, gradients, optimiser], abs=1e-3)


def test_float32_and_fp32_accumulation():
    names = ("weights", "gradients", "optimiser")
    plain = gigabytes(Setup(world_size=8, zero_stage=0, dtype="float32"), *names)
    assert plain == pytest.approx([65.023, 65.023, 130.045], abs=1e-3)  # 4 P, 4 P, 8 P
    sharded = gigabytes(Setup(world_size=8, zero_stage=3, gradient_dtype="float32"), *names)
    assert sharded == pytest.approx([4.064, 8.128, 24.383], abs=1e-3)


def test_offload_moves_to_the_host_what_zero_divided():
    near = forecast(MINI, Setup(world_size=8, zero_stage=3))
    far = forecast(MINI, Setup(world_size=8, zero_stage=3, offload_optimizer=True, offload_param=True))
    moved = 4.064 + 4.064 + 24.383
    assert near.host_bytes == 0
    assert far.host_bytes / 1e9 == pytest.approx(moved, abs=2e-3)
    assert (near.device_bytes - far.device_bytes) / 1e9 == pytest.approx(moved, abs=2e-3)


def test_adapters_leave_gradients_and_states_for_themselves():
    targets = ("q_proj", "v_proj")
    by_hand = 20 * 8 * ((2048 + 2048) + (2048 + 512))  # layers x r x (in + out)
    assert count_adapters(MINI, 8, targets) == by_hand
    setup = Setup(world_size=1, lora_r=8, lora_target_modules=targets)
    weights, gradients, optimiser = gigabytes(setup, "weights", "gradients", "optimiser")
    assert weights == pytest.approx(2 * (16_255_638_528 + by_hand) / 1e9)
    assert (gradients, optimiser) == pytest.approx((2 * by_hand / 1e9, 12 * by_hand / 1e9))
    assert "gradient of the head" not in {line.name for line in forecast(MINI, setup).lines}

    policy = load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32")
    add_adapters(policy, r=8, alpha=16, dropout=0.0, target_modules=list(targets))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert count_adapters(GOLDEN_DIR / "llada2_tiny", 8, targets) == trained


def test_the_peak_is_the_larger_of_two_phases():
    found = forecast(MINI, Setup(world_size=8, zero_stage=3, gradient_checkpointing=True))
    by_phase = {phase: sum(line.bytes for line in found.lines if line.phase is phase) for phase in Phase}
    assert by_phase[Phase.LAYER] > by_phase[Phase.HEAD] > 0
    assert found.device_bytes == by_phase[Phase.ALWAYS] + by_phase[Phase.LAYER]
    assert all(line.formula for line in found.lines)


class KeptForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the storages that autograd keeps, apart from parameters and masks of S x S."""

    def __init__(self, policy, length):
        self.storages = {}
        skip = {p.untyped_storage().data_ptr() for p in policy.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in skip and tuple(tensor.shape[-2:]) != (length, length):
                self.storages[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        super().__init__(keep, lambda tensor: tensor)

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llada2_moe", "qwen3"])
def test_activations_of_a_layer_are_what_autograd_keeps(tmp_path, monkeypatch, family, dtype):
    """Three layers less two, per position, within 6 percent; sizes are all different, so that no term hides another."""
    length = 200
    monkeypatch.setattr(attention, "FLOAT32_ON", set())  # as on a GPU, which the forecast is about
    monkeypatch.setattr(norms, "ON", set())

    def kept(layers):
        directory = tmp_path / str(layers)
        sizes = {"hidden_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
        if family == "llada2_moe":
            sizes |= {"moe_intermediate_size": 40, "num_experts": 16, "num_experts_per_tok": 4, "n_group": 4}
            write_tiny_config(directory, num_hidden_layers=layers, **sizes)
        else:
            directory.mkdir()
            config = CONFIGS[family] | sizes | {"num_hidden_layers": layers, "intermediate_size": 144}
            (directory / "config.json").write_text(json.dumps(config))
        policy = load_policy(directory, dtype=dtype, init_weights="random")
        everything = MaskPlan(torch.ones(1, length, length, dtype=torch.bool))
        keeper = KeptForBackward(policy, length)
        with keeper:
            hidden = policy.hidden(torch.arange(length)[None] % 90, torch.arange(length)[None], everything)
        assert hidden.requires_grad
        return keeper.bytes, read_config(directory)

    (three, config), (two, _) = kept(3), kept(2)
    per_position, formula = layer_activations(config, dtype)
    assert per_position == pytest.approx((three - two) / length, rel=0.06), formula


def test_a_setup_from_a_recipe(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text(
        "model_name_or_path: tiny\noutput_dir: out\ndatasets: [{path: data.jsonl}]\nmax_length: 64\nblock_size: 8\n"
        "gradient_checkpointing: true\nper_device_train_batch_size: 3\n"
    )
    deepspeed = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    setup = setup_of(load_recipe(tmp_path / "recipe.yaml"), deepspeed, world_size=4)
    assert setup == Setup(
        world_size=4,
        zero_stage=3,
        gradient_dtype="float32",
        offload_optimizer=True,
        gradient_checkpointing=True,
        rows=3,
        row_length=64 * 3,  # the document and its complementary pair of views
        lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        reduce_bucket=1000,
    )


def learner_bytes(zero_stage: int, *keys: str) -> int:
    from dfactory.engine.trainer import deepspeed_config

    recipe = load_recipe(
        RECIPES / "llada2_mini/rl.yaml", [*keys, f"deepspeed={RECIPES}/deepspeed/zero{zero_stage}.json"]
    )
    return forecast(Path(recipe.model_name_or_path), setup_of(recipe, deepspeed_config(recipe), 8)).device_bytes


@pytest.mark.parametrize("zero_stage, gigabytes", [(2, 32.511), (3, 4.064)])  # 2 P, and an eighth of it
def test_the_reference_of_the_kl_term_is_counted(zero_stage, gigabytes):
    more = learner_bytes(zero_stage, "kl_coef=0.1") - learner_bytes(zero_stage)
    assert more / 1e9 == pytest.approx(gigabytes, abs=1e-3)
    adapted = [learner_bytes(zero_stage, "use_peft=true", f"kl_coef={kl}") for kl in (0, 0.1)]
    assert adapted[0] == adapted[1]  # the adapters are switched off


# What decides which models a recipe holds.
HOLDING = [
    [f"use_peft={peft}", f"reference={kind}", f"kl_coef={kl}"]
    for peft in ("true", "false")
    for kind in ("null", "copy", "precomputed")
    for kl in (0, 0.1)
]


@pytest.mark.parametrize("keys", HOLDING, ids=" ".join)
@pytest.mark.parametrize("stage", STAGES)
def test_every_model_that_is_loaded_is_counted(stage, keys, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text(
        f"model_name_or_path: {GOLDEN_DIR / 'llada2_tiny'}\noutput_dir: out\ndatasets: [{{path: data.jsonl}}]\n"
        "dtype: float32\nmax_length: 64\nblock_size: 8\nmax_steps: 1\n"
        "decode: {temperature: 1.0, acceptance: top, max_new_tokens: 8}\n"
    )
    own = key_names(STAGES[stage])
    keys = [key for key in (*keys, "reward_funcs=[exact_match]") if key.split("=")[0] in own | {"use_peft"}]
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"stage={stage}", *keys])
    loaded = []
    read = assembly.load_policy
    monkeypatch.setattr(
        assembly, "load_policy", lambda *given, **options: loaded.append(read(*given, **options)) or loaded[-1]
    )
    trained = assembly.make_policy(recipe)
    assembly.initial_score(recipe, SimpleNamespace(policy=trained, score=trained))
    held = sum(4 * parameter.numel() for policy in loaded for parameter in policy.parameters())
    lines = forecast(Path(recipe.model_name_or_path), setup_of(recipe, {}, 1)).lines
    counted = [line for line in lines if line.name in ("weights", *recipe.frozen_models)]
    assert len(counted) == len(loaded)
    assert sum(line.bytes for line in counted) == held


def test_no_model_is_loaded_that_was_not_declared(tmp_path):
    recipe = SimpleNamespace(frozen_models=())
    with pytest.raises(ValueError, match="teacher is not among"):
        assembly.load_frozen(recipe, "teacher")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("name, ranks", [("mini", (8, 16)), ("flash", (16, 32))])
def test_the_recipes_state_their_forecast(name, ranks, stage):
    """The head of each YAML says what is forecast for it; and it fits GPUs of 80 GB with a tenth to spare."""
    from dfactory.engine.trainer import deepspeed_config

    path = RECIPES / f"llada2_{name}" / f"{stage}.yaml"
    header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    recipe = load_recipe(path)
    for world_size in ranks:
        found = forecast(Path(recipe.model_name_or_path), setup_of(recipe, deepspeed_config(recipe), world_size))
        assert f"{found.device_bytes / 1e9:.0f} GB" in header
        assert found.device_bytes < 72e9
        if found.host_bytes:
            assert f"{8 * found.host_bytes / 1e9:.0f} GB" in header  # of a machine with 8 GPUs
