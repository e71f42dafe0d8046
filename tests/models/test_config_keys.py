"""config.json: what a family computes is read, what it does not is refused by name, sizes are bounded."""

import json
import time
from pathlib import Path

import pytest

from dfactory.errors import CheckpointError
from dfactory.models.config_keys import BOOKKEEPING
from dfactory.models.families.base import FAMILIES
from dfactory.models.registry import meta_model, read_config
from dfactory.models.tiny import TINY_DIR, tiny_config
from tests.models.conftest import CONFIGS, GOLDEN_DIR

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = {"llada2_moe": tiny_config(), **CONFIGS}
KEYS = {variant.model_type: family.keys for family in FAMILIES for variant in family.variants}

# As Ling 2.0 and LLaDA2.0 to 2.2 publish them, beside the keys of recipes/llada2_mini/model.
PUBLISHED = {
    "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
    "bos_token_id": None,
    "eos_token_id": 156892,
    "max_window_layers": 28,
    "moe_router_enable_expert_bias": True,
    "num_nextn_predict_layers": 0,
    "output_router_logits": False,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "transformers_version": "4.52.3",
    "use_rmsnorm": True,
    "expert_capacity": None,
}


@pytest.fixture
def config_dir(tmp_path):
    def write(family: str, **keys) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(TINY[family] | keys))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "directory",
    [RECIPES / "llada2_mini/model", RECIPES / "llada2_flash/model", TINY_DIR, *sorted(GOLDEN_DIR.glob("llada2*"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_real_configurations_pass(directory, tmp_path):
    read_config(directory)
    keys = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | PUBLISHED))
    read_config(tmp_path)


@pytest.mark.parametrize("family", TINY)
def test_what_transformers_writes_is_read_again(config_dir, tmp_path, family):
    """Its own bookkeeping is known, in whatever version."""
    config = read_config(config_dir(family))
    older = {"torch_dtype": "bfloat16", "temperature": 1.0, "pruned_heads": {}, "top_k": 50}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | older))
    again = read_config(tmp_path).to_dict()
    assert {name: again[name] for name in KEYS[family] if name in config.to_dict()} == {
        name: value for name, value in config.to_dict().items() if name in KEYS[family]
    }


OTHER_ARITHMETIC = {
    "llada2_moe": {
        "expert_capacity": 48,  # LLaDA2.2's block routing
        "use_bias": True,
        "use_qkv_bias": True,
        "attention_bias": True,
        "score_function": "softmax",
        "router_dtype": "bf16",
        "moe_router_enable_expert_bias": False,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
        "use_sliding_window": True,
        "norm_head": True,
        "embedding_dropout": 0.1,
        "hidden_act": "gelu",
        "attention_dropout": 0.1,
        "quantization_config": {"quant_method": "fp8"},
        "logit_scale": 0.5,
        "moe_layer_freq": [0, 1],
    },
    "qwen3": {
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "rope_parameters": {"rope_type": "longrope"},
        "attention_dropout": 0.1,
        "partial_rotary_factor": 0.5,
        "hidden_act": "gelu",
        "quantization_config": {"quant_method": "gptq"},
        "final_logit_softcapping": 30.0,
    },
    "qwen3_moe": {"shared_expert_intermediate_size": 64, "expert_capacity": 4, "norm_topk_prob": "yes"},
    "llama": {
        "attention_dropout": 0.1,
        "sliding_window": 128,
        "pretraining_tp": 2,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "no_rope_layers": [0],
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.2,
        "is_encoder_decoder": True,
    },
}


@pytest.mark.parametrize(
    "family, key, value", [(family, *item) for family, keys in OTHER_ARITHMETIC.items() for item in keys.items()]
)
def test_other_arithmetic_is_refused_by_name(config_dir, family, key, value):
    with pytest.raises(CheckpointError, match=rf"^{key} .* in .*config\.json"):
        read_config(config_dir(family, **{key: value}))


def test_a_key_that_was_never_heard_of_is_refused_in_every_family(config_dir):
    for family in TINY:
        read_config(config_dir(family, some_new_key=None))
        with pytest.raises(CheckpointError, match=rf"some_new_key 0 in .*model_type {family} has no such key here"):
            read_config(config_dir(family, some_new_key=0))


def test_rotation_that_does_not_depend_on_the_row_is_read(config_dir):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    keys = {"rope_scaling": llama3 | {"original_max_position_embeddings": 64}}
    assert read_config(config_dir("llama", **keys)).rope_parameters["rope_type"] == "llama3"


SIZES = ("num_hidden_layers", "num_experts", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30, 2.0, True, "8", [8]])
@pytest.mark.parametrize("key", SIZES)
def test_sizes_are_bounded(config_dir, key, value):
    started = time.process_time()
    for family in TINY:
        if key in KEYS[family]:
            with pytest.raises(CheckpointError, match=rf"^{key} .*it must be a whole number from 1 to"):
                read_config(config_dir(family, **{key: value}))
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads is no multiple of num_key_value"),
        ({"num_attention_heads": 9_999, "num_key_value_heads": 9_999}, "num_attention_heads exceeds hidden_size"),
        ({"head_dim": 15}, "head_dim is odd"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok exceeds num_experts"),
        ({"n_group": 3}, "num_experts is no multiple of n_group"),
        ({"topk_group": 3}, "topk_group exceeds n_group"),
        ({"pad_token_id": 160}, "pad_token_id is no id of vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small' in .* it must be a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta inf in .* it must be a number above 0"),
    ],
)
def test_sizes_that_do_not_go_together(config_dir, keys, said):
    with pytest.raises(CheckpointError, match=said):
        read_config(config_dir("llada2_moe", **keys))


def test_the_largest_sizes_that_pass_can_be_built(config_dir):
    """On the meta device, in seconds; what a weight file would then have to hold is another matter."""
    keys = {"hidden_size": 10**6, "intermediate_size": 10**6, "moe_intermediate_size": 10**6, "vocab_size": 10**7}
    keys |= {"num_attention_heads": 10_000, "num_key_value_heads": 10_000, "head_dim": 10_000, "num_experts": 10_000}
    model = meta_model(read_config(config_dir("llada2_moe", **keys)))
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**16


def test_no_key_is_both_bookkeeping_and_ruled():
    for family in FAMILIES:
        assert not BOOKKEEPING & set(family.keys)
