"""SDAR dense and mixture of experts (TraDo, DiRL): Qwen3 and Qwen3-MoE as block-diffusion models.

Facts: docs/families.md#sdar. Names of keys and tensors are Qwen3's, so nothing is renamed.
"""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dfactory.models.config_keys import SWITCH, Rules, size
from dfactory.models.families.base import FAMILIES, Family, InSGLang, SpecialTokens, Variant
from dfactory.models.families.decoder import QWEN3, QWEN3_MOE, QWEN3_MOE_AUTOEP


class SDARConfig(Qwen3Config):
    model_type = "sdar"


class SDARForCausalLM(Qwen3ForCausalLM):
    """The causal-LM class under the name that the checkpoints' config.json states."""

    config_class = SDARConfig
    config: SDARConfig


class SDARMoeConfig(Qwen3MoeConfig):
    model_type = "sdar_moe"


class SDARMoeForCausalLM(Qwen3MoeForCausalLM):
    config_class = SDARMoeConfig
    config: SDARMoeConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers finds out by reading the class's file, but the experts are Qwen3Moe's


_OTHERS: Rules = {
    # how the original code trains and parallelises; without a part in the arithmetic
    "debug": SWITCH,
    "ep_size": size(10_000),
    "fuse_cross_entropy": SWITCH,
    "micro_forward": SWITCH,
    "skip_checkpoint": SWITCH,
    "use_deepep": SWITCH,
}
_SPECIAL = SpecialTokens(mask=151669, eos=151643)

FAMILIES.add(
    Family(
        "sdar",
        (
            Variant(
                "sdar",
                SDARConfig,
                SDARForCausalLM,
                checkpoints="SDAR-Chat 1.7B, 4B, 8B, TraDo, DiRL",
                in_sglang=InSGLang(SDARForCausalLM.__name__, _SPECIAL.mask),
            ),
        ),
        keys=QWEN3 | _OTHERS,
        block_size=4,
        block_size_key="block_size",
        block_size_in_config=True,
        special=_SPECIAL,
    )
)
FAMILIES.add(
    Family(
        "sdar_moe",
        (
            Variant(
                "sdar_moe",
                SDARMoeConfig,
                SDARMoeForCausalLM,
                renames=get_checkpoint_conversion_mapping(Qwen3MoeConfig.model_type),
                checkpoints="SDAR-30B-A3B-Chat",
                in_sglang=InSGLang(SDARMoeForCausalLM.__name__, _SPECIAL.mask),
            ),
        ),
        keys=QWEN3_MOE | _OTHERS,
        block_size=4,
        block_size_key="block_size",
        block_size_in_config=True,
        special=_SPECIAL,
        moe_blocks=("Qwen3MoeSparseMoeBlock",),
        autoep=QWEN3_MOE_AUTOEP,
    )
)
