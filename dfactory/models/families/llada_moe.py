"""LLaDA-MoE 7B-A1B: Qwen3's mixture of experts with full attention.

Facts: docs/families.md#llada-moe. config.json states the model_type of the dense LLaDA, so `architectures` tells them apart;
dllm's copy has a model_type of its own. Tensors have Qwen3-MoE's names. The original sets `norm_topk_prob` to false and
never reads the key, nor those of other routers.
"""

from typing import Any

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dfactory.models.config_keys import ANYTHING, DECODER, Rule, Rules, only, size
from dfactory.models.families.base import FAMILIES, Attention, Family, SpecialTokens, Variant
from dfactory.models.families.decoder import QWEN3_MOE_AUTOEP
from dfactory.models.families.llada import LLaDAConfig

_RENAMED_KEYS = {"expert_intermediate_size": "moe_intermediate_size", "dense_intermediate_size": "intermediate_size"}
_UNREAD = (
    "norm_topk_prob",
    "routed_scaling_factor",
    "moe_router_score_function",
    "router_num_group",
    "router_topk_group",
)


class LLaDAMoEConfig(Qwen3MoeConfig):
    """Reads config.json as the LLaDA-MoE checkpoints have it; `config_keys` has already refused what is not computed."""

    model_type = "lladamoe"

    def __init__(self, **keys: Any):
        translated = {_RENAMED_KEYS.get(name, name): value for name, value in keys.items() if name not in _UNREAD}
        if translated.get("num_key_value_heads") is None and "num_attention_heads" in translated:
            translated["num_key_value_heads"] = translated["num_attention_heads"]
        super().__init__(**translated, norm_topk_prob=False)


class LLaDAMoEModelLM(Qwen3MoeForCausalLM):
    """The causal-LM class under the name that the checkpoints' config.json states."""

    config_class = LLaDAMoEConfig
    config: LLaDAMoEConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers finds out by reading the class's file, but the experts are Qwen3Moe's


def _variant(model_type: str, architectures: tuple[str, ...], checkpoints: str) -> Variant:
    renames = get_checkpoint_conversion_mapping(Qwen3MoeConfig.model_type)
    return Variant(model_type, LLaDAMoEConfig, LLaDAMoEModelLM, architectures, renames, checkpoints)


_ALL_LAYERS = Rule(lambda v: isinstance(v, list) and set(v) <= {1}, "only experts in every layer (all 1) are supported")

_OWN = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act")
_KEYS: Rules = {
    **{name: DECODER[name] for name in (*_OWN, "rms_norm_eps", "rope_theta", "tie_word_embeddings", "pad_token_id")},
    **dict.fromkeys(_UNREAD, ANYTHING),
    "num_experts": size(10_000),
    "num_experts_per_tok": size(10_000),
    "expert_intermediate_size": size(),
    "dense_intermediate_size": size(),
    "moe_layer_freq": _ALL_LAYERS,
    "moe_router_enable_expert_bias": only(False),  # a bias would be added to the weights themselves
    "shared_expert_intermediate_size": only(None),
    "qk_layernorm": only(True),
    "attention_bias": only(False),
    "attention_dropout": only(0.0),
    "clip_qkv": only(None),
    "partial_rotary_factor": only(1),
    "rope_scaling": only(None),
}

FAMILIES.add(
    Family(
        "llada_moe",
        (
            _variant(
                LLaDAConfig.model_type,
                ("LLaDAMoEModelLM", "LLaDAMoEModel"),
                "LLaDA-MoE 7B-A1B Base and Instruct",
            ),
            _variant(LLaDAMoEConfig.model_type, (), "the same in dllm's copy"),
        ),
        keys=_KEYS,
        attention=Attention.FULL,
        block_size=None,
        special=SpecialTokens(mask=156895, eos=156892),
        moe_blocks=("Qwen3MoeSparseMoeBlock",),
        autoep=QWEN3_MOE_AUTOEP,
    )
)
