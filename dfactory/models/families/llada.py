"""LLaDA 8B (Base, Instruct, 1.5) and iLLaDA 8B: Llama with full attention.

Facts: docs/families.md#llada. LLaDA's config.json has OLMo's key names and its tensors have names of their own, two of them
`ff_out`: the head, and the down projection of a block. iLLaDA has Llama's names for both; of it only config.json is public
knowledge here, and no output of its code was compared.
"""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import WeightRenaming

from dfactory.models.config_keys import ANYTHING, DECODER, POSITIVE, ROPE, SWITCH, Rules, only, size
from dfactory.models.families.base import FAMILIES, Attention, Family, SpecialTokens, Variant

_RENAMED_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}

# What a config.json that is silent means, where Llama's own default differs.
_DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "weight_tying": True}


class LLaDAConfig(LlamaConfig):
    """Reads config.json as the LLaDA checkpoints have it; `config_keys` has already refused what Llama does not compute."""

    model_type = "llada"

    def __init__(self, **keys: Any):
        translated = {_RENAMED_KEYS.get(name, name): value for name, value in (_DEFAULTS | keys).items()}
        # The embedding and the head may have more rows than the tokenizer has tokens.
        if rows := translated.pop("embedding_size", None):
            translated["vocab_size"] = rows
        if translated.get("intermediate_size") is None and "mlp_ratio" in keys:
            translated["intermediate_size"] = keys["mlp_ratio"] * translated["hidden_size"]
        # Llama would give the padding token's embedding no gradient. The original's has one: it is EOS.
        translated["pad_token_id"] = None
        super().__init__(**translated)


class LLaDAModelLM(LlamaForCausalLM):
    """The causal-LM class under the name that the checkpoints' config.json states."""

    config_class = LLaDAConfig
    config: LLaDAConfig


class ILLaDAConfig(LlamaConfig):
    model_type = "illada"


class ILLaDAForCausalLM(LlamaForCausalLM):
    config_class = ILLaDAConfig
    config: ILLaDAConfig


_RENAMES = [
    WeightRenaming(r"^model\.transformer\.wte\.", "model.embed_tokens."),
    WeightRenaming(r"^model\.transformer\.ln_f\.", "model.norm."),
    WeightRenaming(r"^model\.transformer\.ff_out\.", "lm_head."),
    WeightRenaming(r"^model\.transformer\.blocks\.", "model.layers."),
    WeightRenaming(r"\.attn_norm\.", ".input_layernorm."),
    WeightRenaming(r"\.ff_norm\.", ".post_attention_layernorm."),
    WeightRenaming(r"\.q_proj\.", ".self_attn.q_proj."),
    WeightRenaming(r"\.k_proj\.", ".self_attn.k_proj."),
    WeightRenaming(r"\.v_proj\.", ".self_attn.v_proj."),
    WeightRenaming(r"\.attn_out\.", ".self_attn.o_proj."),
    WeightRenaming(r"\.ff_proj\.", ".mlp.gate_proj."),
    WeightRenaming(r"\.up_proj\.", ".mlp.up_proj."),
    WeightRenaming(r"\.ff_out\.", ".mlp.down_proj."),
]

_KEYS: Rules = {
    **{name: DECODER[name] for name in ("vocab_size", "rms_norm_eps", "rope_theta", "pad_token_id")},
    "embedding_size": DECODER["vocab_size"],
    "d_model": size(),
    "n_layers": size(1_000),
    "n_heads": size(10_000),
    "n_kv_heads": size(10_000),
    "mlp_hidden_size": size(),
    "mlp_ratio": size(1_000),
    "max_sequence_length": size(10**9),
    "weight_tying": SWITCH,
    "activation_type": only("silu"),
    "block_type": only("llama"),
    "block_group_size": only(1),
    "layer_norm_type": only("rms"),
    "layer_norm_with_affine": only(True),
    "bias_for_layer_norm": only(False),
    "attention_layer_norm": only(False),
    "include_bias": only(False),
    "include_qkv_bias": only(False),
    "rope": only(True),
    "alibi": only(False),
    "scale_logits": only(False),
    "input_emb_norm": only(False),
    "multi_query_attention": only(None),  # n_kv_heads says it
    "clip_qkv": only(None),
    **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), only(0.0)),
    # How the original initialises and computes, and what is unused with the values above.
    **dict.fromkeys(("init_cutoff_factor", "init_device", "init_fn", "init_std", "precision"), ANYTHING),
    **dict.fromkeys(("flash_attention", "rope_full_precision", "attention_layer_norm_with_affine"), SWITCH),
    "alibi_bias_max": POSITIVE,
}

FAMILIES.add(
    Family(
        "llada",
        (
            Variant(
                "llada",
                LLaDAConfig,
                LLaDAModelLM,
                architectures=("LLaDAModelLM",),
                renames=_RENAMES,
                checkpoints="LLaDA 8B Base and Instruct, LLaDA-1.5",
            ),
        ),
        keys=_KEYS,
        attention=Attention.FULL,
        block_size=None,
        special=SpecialTokens(mask=126336, eos=126081),
    )
)
FAMILIES.add(
    Family(
        "illada",
        (Variant("illada", ILLaDAConfig, ILLaDAForCausalLM, checkpoints="iLLaDA 8B Base and Instruct"),),
        keys=DECODER
        | {
            "rope_scaling": ROPE,
            "rope_parameters": ROPE,
            "attention_bias": only(False),
            "mlp_bias": only(False),
            "pretraining_tp": only(1),
        },
        attention=Attention.FULL,
        block_size=None,
        special=SpecialTokens(mask=5),
    )
)
