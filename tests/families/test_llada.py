"""LLaDA, LLaDA-MoE and iLLaDA beyond their golden files: whose config.json is whose, what is refused, ids and template."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.headers import meta_model
from dfactory.models.registry import known_eos_id, known_mask_id, load_policy, read_config, read_family
from dfactory.models.saving import save_policy
from dfactory.vocabulary import read_vocabulary
from tests.families.cases import FOLDER, policy_of


@pytest.fixture
def config_dir(tmp_path):
    """Write the config.json of a golden checkpoint with changes; a key that is `...` is left out."""

    def write(name: str, **keys):
        stated = json.loads((FOLDER / name / "config.json").read_text()) | keys
        stated = {key: value for key, value in stated.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        return tmp_path

    return write


# --- one model_type, two families -------------------------------------------------------------------------------------


def test_architectures_tell_the_families_apart(config_dir):
    assert read_family(config_dir("llada")).name == "llada"
    assert read_family(config_dir("llada_moe")).name == "llada_moe"
    assert read_family(config_dir("llada_moe", architectures=["LLaDAMoEModel"])).name == "llada_moe"
    for architectures in (["LlavaLLaDA"], None):
        with pytest.raises(
            ConfigError, match="of model_type llada only LLaDAModelLM, LLaDAMoEModelLM, LLaDAMoEModel is"
        ):
            read_family(config_dir("llada", architectures=architectures))


def test_the_copy_with_another_model_type(config_dir, tmp_path):
    """Read and saved under the name that it has."""
    assert read_family(config_dir("llada_moe", model_type="lladamoe")).name == "llada_moe"
    shutil.copy(FOLDER / "llada_moe/model.safetensors", tmp_path)
    (out := tmp_path / "out").mkdir()
    save_policy(load_policy(tmp_path, dtype="float32"), out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "lladamoe"
    assert (
        type(AutoConfig.from_pretrained(out)).__name__ == "LLaDAMoEConfig"
    )  # transformers knows the class by this name
    assert type(AutoConfig.from_pretrained(FOLDER / "llada")).__name__ == "LLaDAConfig"


def test_the_last_layer_runs_at_targets_only():
    assert policy_of("llada").ends_at_targets
    assert policy_of("llada_moe").ends_at_targets


# --- keys -------------------------------------------------------------------------------------------------------------

OTHER_ARITHMETIC = {
    "llada": {
        "alibi": True,
        "rope": False,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "embedding_dropout": 0.1,
        "attention_layer_norm": True,
        "layer_norm_type": "low_precision",
        "layer_norm_with_affine": False,
        "bias_for_layer_norm": True,
        "include_bias": True,
        "include_qkv_bias": True,
        "input_emb_norm": True,
        "scale_logits": True,
        "block_type": "sequential",
        "block_group_size": 2,
        "activation_type": "swiglu",
        "multi_query_attention": True,
        "clip_qkv": 8.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "hidden_size": 64,  # not the name that its code reads
    },
    "llada_moe": {
        "moe_router_enable_expert_bias": True,
        "moe_layer_freq": [0, 1],
        "shared_expert_intermediate_size": 64,
        "qk_layernorm": False,
        "attention_bias": True,
        "clip_qkv": 8.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "hidden_act": "gelu",
        "head_dim": 32,
    },
}


@pytest.mark.parametrize(
    "name, key, value", [(name, *item) for name, keys in OTHER_ARITHMETIC.items() for item in keys.items()]
)
def test_other_arithmetic_is_refused_by_name(config_dir, name, key, value):
    with pytest.raises(CheckpointError, match=rf"^{key} .* in .*config\.json"):
        read_config(config_dir(name, **{key: value}))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"n_kv_heads": 3}, "n_heads is no multiple of n_kv_heads"),
        ({"n_heads": 3, "n_kv_heads": 3}, "d_model is no multiple of n_heads"),
        ({"embedding_size": 300}, "embedding_size is below vocab_size"),
        ({"d_model": 0}, "d_model 0 .* it must be a whole number from 1"),
        ({"n_layers": 10**9}, "n_layers 1000000000 .* it must be a whole number from 1"),
    ],
)
def test_sizes_that_do_not_go_together(config_dir, keys, said):
    with pytest.raises(CheckpointError, match=said):
        read_config(config_dir("llada", **keys))


def test_more_layers_than_the_weights_hold(config_dir, tmp_path):
    config_dir("llada", n_layers=1_000)
    shutil.copy(FOLDER / "llada/model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1,000, but the weights hold 3"):
        load_policy(tmp_path)


def test_what_a_silent_config_means(config_dir):
    """As the defaults of the original's configuration, where they are ones that Llama computes."""
    silent = read_config(config_dir("llada", weight_tying=..., rope_theta=..., mlp_hidden_size=None, n_kv_heads=None))
    assert silent.tie_word_embeddings
    assert silent.rope_parameters["rope_theta"] == 10000.0
    assert silent.intermediate_size == 4 * 64
    assert silent.num_key_value_heads == 4
    assert read_config(config_dir("llada", n_kv_heads=2)).num_key_value_heads == 2
    assert read_config(config_dir("llada_moe", num_key_value_heads=None)).num_key_value_heads == 4
    for dead in ({"norm_topk_prob": True}, {"routed_scaling_factor": 2.5}, {"moe_router_score_function": "sigmoid"}):
        assert read_config(config_dir("llada_moe", **dead)).norm_topk_prob is False


def test_more_rows_than_tokens(config_dir, tmp_path):
    """The embedding and the head have embedding_size rows, as the original's; special ids are ids of the vocabulary."""
    directory = config_dir("llada", embedding_size=384)
    policy = load_policy(directory, dtype="float32", init_weights="random")
    assert policy.model.get_input_embeddings().weight.shape == policy.model.lm_head.weight.shape == (384, 64)
    assert policy.model.get_input_embeddings().padding_idx is None  # EOS, which pads, is trained as an input
    assert known_mask_id(directory, None) == 317
    assert known_mask_id(config_dir("llada", embedding_size=384, mask_token_id=350), None) is None


LLADA_8B = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288}
LLADA_8B |= {"vocab_size": 126464, "embedding_size": 126464, "mask_token_id": ..., "eos_token_id": ...}
LLADA_8B |= {"pad_token_id": 126081}
ILLADA_8B = {
    "model_type": "illada",
    "architectures": ["ILLaDAForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 155136,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def test_published_sizes(config_dir, tmp_path):
    """The parameters that the model cards state: 8.02B of LLaDA 8B, 7.62B of iLLaDA 8B; ids from the families' table."""

    def billions(directory) -> float:
        return round(sum(parameter.numel() for parameter in meta_model(read_config(directory)).parameters()) / 1e9, 2)

    llada = config_dir("llada", **LLADA_8B)
    assert billions(llada) == 8.02
    assert (known_mask_id(llada, None), known_eos_id(llada, None, None)) == (126336, 126081)
    with pytest.raises(
        ConfigError, match=r"mask_token_id 5: the mask of the llada model in .* is 126336; leave the key"
    ):
        known_mask_id(llada, 5)
    (illada := tmp_path / "illada").mkdir()
    (illada / "config.json").write_text(json.dumps(ILLADA_8B))
    assert billions(illada) == 7.62
    assert (known_mask_id(illada, None), read_family(illada).sees_whole_document) == (5, True)


# --- tokenizer and chat template --------------------------------------------------------------------------------------

NAMED = {310: "<|endoftext|>", 309: "<|startoftext|>", 315: "<|eot_id|>", 317: "<|mdm_mask|>"}
NAMED |= {313: "<|start_header_id|>", 314: "<|end_header_id|>"}
TEMPLATE = """{%- for m in messages -%}
{{- bos_token if loop.first -}}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and special tokens at the ids of the golden checkpoint. None is named as the mask."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [NAMED.get(id) or (alphabet[id] if id < 256 else f"<|unused_{id}|>") for id in range(320)]
    backend = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=NAMED[309],
        eos_token=NAMED[310],
        pad_token=NAMED[310],
        additional_special_tokens=[NAMED[id] for id in (313, 314, 315, 317)],
        chat_template=TEMPLATE,
    )


def test_the_template_as_shipped(config_dir, tmp_path):
    """Answers are trained with the token that ends their turn and with EOS, as a canvas has to hold both; the mask is the
    family's; the template is carried along."""
    tokenizer().save_pretrained(config_dir("llada"))
    vocabulary = read_vocabulary(str(tmp_path), mask_token_id=None, eos_token_id=None)
    assert vocabulary.special[:2] == (317, 310)
    turns = [("user", "a b"), ("assistant", " yes "), ("user", "c"), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in turns]
    ids, trainable, *_ = vocabulary.encoder.encode_messages(messages)
    text = vocabulary.tokenizer.decode(ids)
    assert text.startswith("<|startoftext|><|start_header_id|>user<|end_header_id|>\n\na b<|eot_id|>")
    trained = vocabulary.tokenizer.decode([id for id, on in zip(ids, trainable, strict=True) if on])
    assert trained.removesuffix("<|endoftext|>") == "yes<|eot_id|>no<|eot_id|>"

    shutil.copy(FOLDER / "llada/model.safetensors", tmp_path)
    (out := tmp_path / "out").mkdir()
    save_policy(load_policy(tmp_path, dtype="float32"), out)
    saved = read_vocabulary(str(out), mask_token_id=None, eos_token_id=None)
    assert saved.tokenizer.chat_template == TEMPLATE
    assert torch.equal(torch.tensor(saved.encoder.encode_messages(messages)[0]), torch.tensor(ids))
