"""LLaDA2-MoE, and Ling 2.0, out of transformers' Glm4Moe modules: the config keys, the tensor names, nothing else.

Facts: docs/families.md#llada2-moe.

Ling 2.0, the autoregressive family that LLaDA2 was made from, has the same architecture, keys and tensor names under
another model_type; its multi-token-prediction layers, which a block-diffusion model has no use for, are left out.

The checkpoint of the LLaDA2 family differs from Glm4Moe in names only, so a family here is a config class that reads the
original keys and a conversion mapping that transformers applies while it loads, and inverts while we save. Checkpoints
hold their experts one by one (`llada2_moe`, `llada21_moe`) or stacked (`llada2_moe_veomni`). Either layout is read under
any of the three names and saved as it was read; a model with drawn weights is saved in the layout of its name.
"""

import copy
import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
)

from dfactory.models.config_keys import DECODER, DEFAULT_ROPE, MOE, NO_WINDOW, POSITIVE, SWITCH, Rules, only, size
from dfactory.models.families.base import FAMILIES, Family, InSGLang, Variant

# Original keys that say the same as a Glm4Moe key of another name.
_RENAMED_KEYS = {
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
}

# What the family's configuration means where config.json is silent and Glm4Moe's own default differs.
_DEFAULTS = {"rope_theta": 600000.0, "partial_rotary_factor": 0.5, "use_qk_norm": True, "norm_topk_prob": True}

_STACKED_NAME = re.compile(r"\.mlp\.experts\.gate_proj$")  # a tensor name that only the stacked layout has


class LLaDA2MoeConfig(Glm4MoeConfig):
    """Reads config.json as the LLaDA2 checkpoints have it; `config_keys` has already refused keys that it does not
    compute."""

    model_type = "llada2_moe"

    def __init__(self, **keys: Any):
        keys = _DEFAULTS | keys
        translated = {_RENAMED_KEYS.get(name, name): value for name, value in keys.items()}
        rotary = {name: float(translated.pop(name)) for name in ("rope_theta", "partial_rotary_factor")}
        if translated.get("rope_parameters") is None:
            translated["rope_parameters"] = {"rope_type": "default", **rotary}
        self.mtp_layers_left_out = translated.pop("num_nextn_predict_layers", None) or 0
        super().__init__(**translated, num_nextn_predict_layers=0)


class LLaDA21MoeConfig(LLaDA2MoeConfig):
    model_type = "llada21_moe"
    __init__ = LLaDA2MoeConfig.__init__  # transformers gives every config class without one a generated __init__


class LLaDA2MoeVeOmniConfig(LLaDA2MoeConfig):
    model_type = "llada2_moe_veomni"
    __init__ = LLaDA2MoeConfig.__init__


class LingMoeV2Config(LLaDA2MoeConfig):
    """Ling 2.0 (BailingMoeV2ForCausalLM), autoregressive. Older Ling models share the model_type, not the architecture:
    `architectures` tells them apart."""

    model_type = "bailing_moe"
    __init__ = LLaDA2MoeConfig.__init__


class LLaDA2MoeModelLM(Glm4MoeForCausalLM):
    """The causal-LM class under the name that the checkpoints' config.json states."""

    config_class = LLaDA2MoeConfig
    config: LLaDA2MoeConfig

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.save_as(stacked_experts=config.model_type.endswith("veomni"))
        # Glm4Moe skips the tensors of some layers by number; here an unknown tensor is an error, an MTP layer's apart.
        left_out = range(config.num_hidden_layers, config.num_hidden_layers + config.mtp_layers_left_out)
        self._keys_to_ignore_on_load_unexpected = {rf"^model\.layers\.{layer}\." for layer in left_out}

    def save_as(self, stacked_experts: bool) -> None:
        """Choose the expert layout of the tensors that are saved. Reading a checkpoint chooses that of the checkpoint."""
        self._weight_conversions = _conversions(_STACKED if stacked_experts else _ONE_BY_ONE)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers finds out by reading the class's file, but the experts are Glm4Moe's


class LLaDA21MoeModelLM(LLaDA2MoeModelLM):
    config_class = LLaDA21MoeConfig
    config: LLaDA21MoeConfig


class LLaDA2MoeVeOmniModelLM(LLaDA2MoeModelLM):
    config_class = LLaDA2MoeVeOmniConfig
    config: LLaDA2MoeVeOmniConfig


class LingMoeV2ModelLM(LLaDA2MoeModelLM):
    config_class = LingMoeV2Config
    config: LingMoeV2Config


class SplitHeads(ConversionOps):
    """[all q heads, all k heads, all v heads] stacked by rows -> the three matrices; the sizes come from the config."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        config: PreTrainedConfig = kwargs["config"]
        (stacked,) = input_dict.values()
        stacked = stacked[0] if isinstance(stacked, list) else stacked
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts = torch.split(stacked, [count * config.head_dim for count in heads])
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


class JoinExperts(ConversionOps):
    """The experts' gates and ups one by one -> gate_up_proj [E, 2I, H]; every number is copied once."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        gates, ups = (input_dict.pop(pattern) for pattern in source_patterns)
        joined = torch.cat([matrix for pair in zip(gates, ups, strict=True) for matrix in pair])
        return {target_patterns[0]: joined.view(len(gates), -1, joined.shape[-1])}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts()


class SplitExperts(ConversionOps):
    """gate_up_proj [E, 2I, H] -> the experts' gates and ups one by one."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        halves = Chunk(dim=1).convert(input_dict, source_patterns, target_patterns, **kwargs)
        return SplitModulelist(dim=0).convert(halves, source_patterns, target_patterns, **kwargs)

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinExperts()


# The two layouts of the experts, each -> gate_up_proj [E, 2I, H] and down_proj [E, H, I]. Stacked down_proj needs nothing.
_ONE_BY_ONE = (
    WeightConverter(
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        "mlp.experts.gate_up_proj",
        operations=[JoinExperts()],
    ),
    WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
)
_STACKED = (
    WeightConverter(
        ["mlp.experts.gate_proj", "mlp.experts.up_proj"], "mlp.experts.gate_up_proj", operations=[Concatenate(dim=1)]
    ),
)


def _conversions(experts: tuple[WeightConverter, ...]) -> list[WeightConverter | WeightRenaming]:
    """Original names -> Glm4Moe names, with these layouts of the experts."""
    return [
        WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.", ".self_attn."),
        WeightRenaming(r"\.self_attn\.query_layernorm\.", ".self_attn.q_norm."),
        WeightRenaming(r"\.self_attn\.key_layernorm\.", ".self_attn.k_norm."),
        WeightRenaming(r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
        WeightConverter(
            "query_key_value.weight",
            ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
            operations=[SplitHeads()],
        ),
        *copy.deepcopy(experts),
    ]


def has_stacked_experts(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold the experts of a layer in one tensor."""
    return any(_STACKED_NAME.search(name) for name in names)


def save_as_read(model: PreTrainedModel, names: Collection[str]) -> None:
    """Choose the layout of the experts in which the tensors were read."""
    model.save_as(stacked_experts=has_stacked_experts(names))


def _saved_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Multi-token-prediction layers are not read, so none are announced."""
    return keys | ({"num_nextn_predict_layers": 0} if keys.get("num_nextn_predict_layers") else {})


def _warnings(config: PreTrainedConfig) -> list[str]:
    if not config.mtp_layers_left_out:
        return []
    return [
        f"{config.mtp_layers_left_out} multi-token-prediction layer(s) are neither read nor saved: they predict "
        "beyond the next token, which block diffusion does not"
    ]


_KEYS: Rules = (
    DECODER
    | MOE
    | {
        "n_routed_experts": size(10_000),  # as transformers calls num_experts
        "num_shared_experts": size(1_000),
        "n_shared_experts": size(1_000),
        "n_group": size(10_000),
        "topk_group": size(10_000),
        "routed_scaling_factor": POSITIVE,
        "first_k_dense_replace": size(1_000, least=0),
        "num_nextn_predict_layers": size(1_000, least=0),
        "mtp_layers_left_out": size(1_000, least=0),  # in configs that transformers wrote of ours
        "num_mtp_layers": size(1_000, least=0),
        "partial_rotary_factor": POSITIVE,
        "rope_parameters": DEFAULT_ROPE,
        "rope_scaling": only(None),
        "use_qk_norm": SWITCH,
        "use_rmsnorm": only(True),
        "use_bias": only(False),
        "use_qkv_bias": only(False),
        "attention_bias": only(False),
        "use_sliding_window": NO_WINDOW,
        "sliding_window": size(10**9),
        "norm_head": only(False),
        "norm_softmax": only(False),
        "router_dtype": only("fp32"),
        "score_function": only("sigmoid"),
        "moe_router_enable_expert_bias": only(True),
        "embedding_dropout": only(0.0),
        "output_dropout": only(0.0),
    }
)

_RENAMES = _conversions(_ONE_BY_ONE + _STACKED)

_LLADA2 = Family(
    "llada2",
    (
        Variant(
            "llada2_moe",
            LLaDA2MoeConfig,
            LLaDA2MoeModelLM,
            renames=_RENAMES,
            checkpoints="LLaDA2.0 mini (16B), flash (100B)",
            in_sglang=InSGLang(LLaDA2MoeModelLM.__name__, mask=156895),  # that of LLaDA2.1 too
        ),
        Variant("llada21_moe", LLaDA21MoeConfig, LLaDA21MoeModelLM, renames=_RENAMES, checkpoints="LLaDA2.1"),
        Variant(
            "llada2_moe_veomni",
            LLaDA2MoeVeOmniConfig,
            LLaDA2MoeVeOmniModelLM,
            renames=_RENAMES,
            checkpoints="either, with the experts of a layer stacked",
        ),
    ),
    keys=_KEYS,
    moe_blocks=("Glm4MoeMoE",),
    autoep={
        "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
        "score_func": "sigmoid",
        "score_apply": "post",
        "num_experts_attr": "n_routed_experts",
        "has_shared_experts": True,
        "shared_experts_pattern": "shared_experts",
    },
    routes_in_float32=True,
    save_as_read=save_as_read,
    saved_keys=_saved_keys,
    warnings=_warnings,
)
FAMILIES.add(_LLADA2)
FAMILIES.add(
    dataclasses.replace(
        _LLADA2,
        name="ling",
        variants=(
            Variant(
                "bailing_moe",
                LingMoeV2Config,
                LingMoeV2ModelLM,
                architectures=("BailingMoeV2ForCausalLM",),
                renames=_RENAMES,
                checkpoints="Ling 2.0, autoregressive; for `stage: cpt`",
            ),
        ),
        autoregressive=True,
    )
)
