"""Decoders that no family declares: accepted after a self-check, or refused with the reason; what is accepted trains,
decodes, and is saved as it was read."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dfactory.errors import CheckpointError, ConfigError
from dfactory.inference import Pipeline
from dfactory.models.adapters import add_adapters, merge_into_base
from dfactory.models.families.base import FAMILIES
from dfactory.models.registry import load_policy, read_config, read_family
from dfactory.models.saving import save_policy
from dfactory.models.selfcheck import check, shrink
from dfactory.planning.memory import Setup, count_parameters, forecast
from tests.batches import TINY_SIZES, make_batch, random_document
from tests.commands.conftest import ROOT, dfactory, write_recipe, write_records

MASK, EOS = 95, 2
SIZES = TINY_SIZES | {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": None}
PLAIN = {name: value for name, value in SIZES.items() if name != "head_dim"}
FULL = ["full_attention"] * 2
LATENT = {  # queries and keys of 16 numbers, values of 12
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
ACCEPTED = {
    "qwen2": PLAIN,
    "mistral": SIZES | {"sliding_window": None},
    "olmo2": PLAIN,
    "smollm3": PLAIN | {"num_hidden_layers": 4, "tie_word_embeddings": True},  # the last layer does not rotate
    "granite": PLAIN
    | {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "phi3": PLAIN | {"sliding_window": None},
    "gemma3_text": SIZES | {"layer_types": FULL, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "deepseek_v2": PLAIN | LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": PLAIN | LATENT | {"q_lora_rank": 16, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "mixtral": PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def write_config(directory: Path, keys: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(keys))
    return directory


@pytest.fixture(params=ACCEPTED)
def model_dir(request, tmp_path) -> Path:
    return write_config(tmp_path / "model", ACCEPTED[request.param] | {"model_type": request.param})


def random_batch(policy):
    generator = torch.Generator().manual_seed(0)
    rows = [[random_document(generator, 16, 4, 2, policy.config.vocab_size, 4) for _ in range(2)] for _ in range(2)]
    return make_batch(rows)


def test_accepted_trains_decodes_and_is_saved_as_it_was(model_dir, tmp_path):
    policy = load_policy(model_dir, init_weights="random", dtype="float32", seed=1)
    assert policy.family.autoregressive
    assert policy.family.checked
    batch, optimiser = random_batch(policy), torch.optim.AdamW(policy.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        losses.append(-policy(batch).logprob_N.mean())
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]

    (tmp_path / "saved").mkdir()
    save_policy(policy, tmp_path / "saved", block_size=4, mask_token_id=MASK)
    again = load_policy(tmp_path / "saved", dtype="float32")
    assert {name: tensor.tolist() for name, tensor in again.model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in policy.model.state_dict().items()
    }
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype=torch.float32)
    ids = batch.input_ids_RS[:1, :8]
    with torch.no_grad():
        place = batch.place_RS._replace(**{name: torch.zeros_like(ids) for name in ("document", "view", "trunk")})
        hidden = policy.eval().hidden(
            ids, torch.arange(8)[None], policy.plan(place._replace(block=torch.arange(8)[None]))
        )
        torch.testing.assert_close(policy.logits(hidden), plain(ids).logits, atol=1e-4, rtol=1e-4)

    pipeline = Pipeline(tmp_path / "saved", device="cpu", eos_token_id=EOS, max_new_tokens=12, threshold=0.5)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    together = pipeline.generate(prompts)
    alone = [pipeline.generate([prompt], noise_ids=[n])[0] for n, prompt in enumerate(prompts)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_with_full_attention_it_is_decoded_on_a_canvas(tmp_path):
    source = write_config(tmp_path / "source", ACCEPTED["mistral"] | {"model_type": "mistral"})
    policy = load_policy(source, init_weights="random", dtype="float32", seed=1)
    keys = {"mask_token_id": MASK, "eos_token_id": EOS, "max_new_tokens": 6, "threshold": 0.5, "init_weights": "random"}
    (answer,) = Pipeline(source, device="cpu", full_attention=True, dtype="float32", **keys).generate([[5, 6, 7]])
    assert answer.rollout.block_origin == 3  # counted from the end of the prompt: a canvas
    assert policy.family.sees_whole_document is None


@pytest.mark.parametrize("model_type", ["granite", "deepseek_v3"])
def test_adapters_train_and_merge(tmp_path, model_type):
    source = write_config(tmp_path / "source", ACCEPTED[model_type] | {"model_type": model_type})
    policy = load_policy(source, init_weights="random", dtype="float32", seed=1)
    batch = random_batch(policy)
    with torch.no_grad():
        plain = policy(batch).logprob_N
    add_adapters(policy, r=4, alpha=8, dropout=0.0, target_modules=["o_proj"])
    torch.testing.assert_close(policy(batch).logprob_N, plain)
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        (-policy(batch).logprob_N.mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted = policy(batch).logprob_N.detach()
    assert (adapted - plain).abs().max() > 1e-3
    merge_into_base(policy)
    torch.testing.assert_close(policy(batch).logprob_N, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_through_the_verbs(tmp_path):
    """Latent attention and experts under ZeRO-3: converted, evaluated, generated with, exported."""
    source = write_config(tmp_path / "source", ACCEPTED["deepseek_v3"] | {"model_type": "deepseek_v3"})
    model = tmp_path / "model"
    model.mkdir()
    save_policy(load_policy(source, init_weights="random", dtype="float32", seed=1), model)
    held_out = write_records(tmp_path / "held_out.jsonl", 3, 90)
    stage_3 = {"deepspeed_overrides": {"zero_optimization": {"stage": 3}}, "stage": "cpt"}
    probe = {"eval_steps": 2, "eval_datasets": [{"path": str(held_out)}], "eval_decode_prompts": 2}
    recipe = write_recipe(tmp_path, model, 90, MASK, 94, **stage_3, **probe, decode={"max_new_tokens": 8})
    assert "self-check: causal, at block size 1: logits differ by" in dfactory("train", recipe).stdout
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["eval/tokens_per_forward"] > 0

    dfactory("export", "--model", tmp_path / "run", "--output", tmp_path / "exported")
    exported, read = (load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", model))
    assert exported.keys() == read.keys()
    assert any(not exported[name].equal(read[name]) for name in read)


def test_parameters_and_memory_are_forecast(model_dir):
    policy = load_policy(model_dir, init_weights="random", dtype="float32")
    counts = count_parameters(model_dir)
    assert counts.total == sum(parameter.numel() for parameter in policy.parameters())
    assert counts.active <= counts.total
    assert (counts.experts > 0) == bool(policy.family.moe_blocks)
    assert forecast(model_dir, Setup(world_size=2, zero_stage=3)).device_bytes > 0


@pytest.mark.slow
def test_the_page_names_what_passes(tmp_path):
    """With the default values of each configuration class."""
    page = (ROOT / "docs/families.md").read_text()
    (listed,) = re.findall(r"default values of their configuration classes:(.*?)\.\n", page, flags=re.DOTALL)
    for model_type in re.findall(r"`(\w+)`", listed):
        keys = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False)) | {"model_type": model_type}
        assert read_family(write_config(tmp_path / model_type, keys)).checked, model_type


def test_what_was_checked_is_told(tmp_path):
    family = read_family(write_config(tmp_path, ACCEPTED["granite"] | {"model_type": "granite"}))
    words = "\n".join(family.checked)
    for part in (
        "causal, at block size 1",
        "block-causal, packed, with a shared prefix",
        "full attention",
        "gradients",
    ):
        assert part in words
    assert "logits are divided by logits_scaling 8.0" in words
    assert family.logit_scale == 1 / 8
    assert "last layer at targets only: not for this class" in words  # its residuals are scaled


def test_a_window_that_hides_nothing_is_accepted(tmp_path):
    keys = SIZES | {"model_type": "mistral", "sliding_window": SIZES["max_position_embeddings"]}
    assert (
        "its sliding window is as long as the longest sequence" in read_family(write_config(tmp_path, keys)).checked[-1]
    )


def test_a_configuration_is_checked_once_a_process(tmp_path, monkeypatch):
    keys = PLAIN | {"model_type": "qwen2", "rope_theta": 54321.0}
    read_config(write_config(tmp_path, keys))
    monkeypatch.setattr(check._Check, "run", lambda self: pytest.fail("checked again"))
    config = read_config(write_config(tmp_path / "again", keys | {"hidden_size": 64, "torch_dtype": "bfloat16"}))
    assert FAMILIES.of(config) is FAMILIES.of(read_config(tmp_path))


# Keys that public checkpoints have beside those of the class, each with the value that the class computes anyway.
PUBLISHED = {
    "deepseek_v3": ACCEPTED["deepseek_v3"]
    | {"ep_size": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "pretraining_tp": 1}
    | {"num_nextn_predict_layers": 1, "seq_aux": True, "aux_loss_alpha": 0.001, "auto_map": {"AutoConfig": "x.Y"}},
    "deepseek_v2": ACCEPTED["deepseek_v2"] | {"scoring_func": "softmax", "moe_layer_freq": 1},
    "phi3": ACCEPTED["phi3"] | {"attention_bias": False, "full_attn_mod": 1, "partial_rotary_factor": 0.75},
    "glm4_moe": SIZES
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    | {"partial_rotary_factor": 0.5, "use_qk_norm": True, "num_nextn_predict_layers": 1},
    "qwen2": PLAIN | {"use_mrope": False, "use_sliding_window": False, "sliding_window": 128, "max_window_layers": 1},
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_keys_of_public_checkpoints_are_read(tmp_path, model_type):
    keys = PUBLISHED[model_type] | {"model_type": model_type}
    family, config = read_family(write_config(tmp_path, keys)), read_config(tmp_path)
    assert family.saved_keys(keys).get("num_nextn_predict_layers", 0) == 0
    assert bool(family.warnings(config)) == bool(keys.get("num_nextn_predict_layers"))


WINDOW = r"^sliding_window 64 in .*: block diffusion attends to the whole clean past.*max_position_embeddings 256"
REFUSED = {
    "made-up": (
        {"model_type": "made_up"},
        ConfigError,
        "^model_type 'made_up' in .* is not a known family: .*llada2_moe",
    ),
    "no-language": ({"model_type": "vit"}, ConfigError, "^model_type 'vit' in .*no causal language model"),
    "encoder-decoder": (
        {"model_type": "t5", "is_encoder_decoder": True},
        CheckpointError,
        "^is_encoder_decoder True in",
    ),
    "state-space": ({"model_type": "mamba"}, CheckpointError, "^layer_types with linear_attention in .*full_attention"),
    "hybrid": (PLAIN | {"model_type": "qwen3_next"}, CheckpointError, "^layer_types with linear_attention in"),
    "chunked": (PLAIN | {"model_type": "llama4_text"}, CheckpointError, "^layer_types with chunked_attention in"),
    "window": (SIZES | {"model_type": "mistral", "sliding_window": 64}, CheckpointError, WINDOW),
    "window-in-some": (SIZES | {"model_type": "gemma3_text", "sliding_window": 64}, CheckpointError, WINDOW),
    "sinks": (SIZES | {"model_type": "gpt_oss", "layer_types": FULL}, CheckpointError, "attention sinks"),
    "capped": (SIZES | {"model_type": "gemma2", "layer_types": FULL}, CheckpointError, "capped attention scores"),
    "twice": (PLAIN | {"model_type": "diffllama"}, CheckpointError, "call transformers' attention interface 4 times"),
    "own-attention": (
        {"model_type": "bloom"},
        CheckpointError,
        "do not attend through transformers' attention interface",
    ),
    "biased-head": (PLAIN | {"model_type": "phi"}, CheckpointError, "the head of PhiForCausalLM is not a linear layer"),
    "pictures": ({"model_type": "gemma3", "vision_config": {}}, CheckpointError, "^vision_config in .*images"),
    "unknown-key": (PLAIN | {"model_type": "qwen2", "expert_capacity": 4}, CheckpointError, "^expert_capacity 4 in"),
    "dropout": (
        PLAIN | {"model_type": "qwen2", "attention_dropout": 0.1},
        CheckpointError,
        "^attention_dropout 0.1 in",
    ),
    "rotation": (
        PLAIN | {"model_type": "qwen2", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        CheckpointError,
        "^rope_scaling .* its rope_type must be one of",
    ),
    "rotation-of-some-layers": (
        SIZES
        | {"model_type": "gemma3_text", "layer_types": FULL}
        | {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
        CheckpointError,
        "^rope_parameters .* its rope_type must be one of",
    ),
    "router": (
        ACCEPTED["deepseek_v3"] | {"model_type": "deepseek_v3", "scoring_func": "softmax"},
        CheckpointError,
        "^scoring_func 'softmax' in .* only 'sigmoid' is supported",
    ),
    "part-of-a-head": (
        SIZES | {"model_type": "mistral", "partial_rotary_factor": 0.5, "sliding_window": None},
        CheckpointError,
        "^partial_rotary_factor 0.5 in",
    ),
    "other-head": (
        PLAIN | {"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"]},
        CheckpointError,
        r"^architectures \['Qwen2ForRewardModel'\] in .*is Qwen2ForCausalLM",
    ),
    "size": (
        PLAIN | {"model_type": "qwen2", "num_hidden_layers": 10**9},
        CheckpointError,
        "^num_hidden_layers 1000000000",
    ),
}


@pytest.mark.parametrize("keys, error, said", REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(tmp_path, keys, error, said):
    with pytest.raises(error, match=said):
        read_config(write_config(tmp_path, keys))


def test_a_class_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    """The check has teeth: the house's attention off by a little, and a decoder that would pass does not."""
    honest = check.ALL_ATTENTION_FUNCTIONS[check.attention.ATTENTION]

    def slightly_off(*arguments, scaling, **given):
        return honest(*arguments, scaling=1.01 * scaling, **given)

    monkeypatch.setitem(check.ALL_ATTENTION_FUNCTIONS, check.attention.ATTENTION, slightly_off)
    with pytest.raises(CheckpointError, match=r"causal, at block size 1: logits differ by .*, more than .*e-0"):
        read_config(write_config(tmp_path, PLAIN | {"model_type": "qwen2", "rope_theta": 777.0}))


def test_half_a_checkpoint_is_refused(tmp_path):
    source = write_config(tmp_path / "source", PLAIN | {"model_type": "qwen2"})
    policy = load_policy(source, init_weights="random", dtype="float32")
    (tmp_path / "half").mkdir()
    save_policy(policy, tmp_path / "half")
    file = tmp_path / "half/model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.1\.mlp\.down_proj\.weight \[32, 64\]"):
        load_policy(tmp_path / "half")


def test_a_small_configuration_keeps_the_switches_and_a_layer_of_each_kind():
    kinds = [0, 0, 0, 1] * 3
    keys = {
        "num_hidden_layers": 12,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 100_000,
        "no_rope_layers": kinds,
        "mlp_only_layers": [11],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": [5, 6],
        "sliding_window": 4096,
    }
    small = shrink(keys)
    assert small["num_hidden_layers"] == 3
    assert small["no_rope_layers"] == [0, 1, 1]
    assert small["mlp_only_layers"] == [2]
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)
    assert small["tie_word_embeddings"] is True
    assert small["rms_norm_eps"] == 1e-6
    assert small["sliding_window"] == 4
    assert shrink(keys, keep_windows=True)["sliding_window"] == 4096
    renamed = {"n_layer" if name == "num_hidden_layers" else name: value for name, value in keys.items()}
    assert shrink(renamed, {"num_hidden_layers": "n_layer"})["n_layer"] == 3
