"""Dream 7B and Dream-Coder: Qwen2 with full attention and logits shifted by one.

Facts: docs/families.md#dream. Names of keys and tensors are Qwen2's, so nothing is renamed.
"""

from transformers import Qwen2Config, Qwen2ForCausalLM

from dfactory.models.config_keys import DECODER, FULL_ATTENTION, NO_WINDOW, ROPE, only, size
from dfactory.models.families.base import FAMILIES, Attention, Family, SpecialTokens, Variant


class DreamConfig(Qwen2Config):
    model_type = "Dream"


class DreamModel(Qwen2ForCausalLM):
    """The causal-LM class under the name that the checkpoints' config.json states."""

    config_class = DreamConfig
    config: DreamConfig


FAMILIES.add(
    Family(
        "dream",
        (Variant("Dream", DreamConfig, DreamModel, checkpoints="Dream-v0 7B, Dream-Coder 7B"),),
        keys=DECODER
        | {
            "rope_scaling": ROPE,
            "rope_parameters": ROPE,
            "use_mrope": only(False),
            "use_sliding_window": NO_WINDOW,
            "sliding_window": size(10**9),  # unused without use_sliding_window
            "layer_types": FULL_ATTENTION,
        },
        attention=Attention.FULL,
        logit_shift=1,
        block_size=None,
        special=SpecialTokens(mask=151666, eos=151643),
    )
)
