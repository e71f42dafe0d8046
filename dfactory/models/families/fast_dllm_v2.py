"""Fast-dLLM v2 1.5B and 7B: Qwen2 as a block-diffusion model whose logits are shifted by one.

Facts: docs/families.md#fast-dllm-v2. Names of keys and tensors are Qwen2's, so nothing is renamed.
"""

from transformers import Qwen2Config, Qwen2ForCausalLM

from dfactory.models.config_keys import DECODER, FULL_ATTENTION, NO_WINDOW, ROPE, SWITCH, only, size
from dfactory.models.families.base import FAMILIES, Family, SpecialTokens, Variant


class FastDLLMQwenConfig(Qwen2Config):
    model_type = "Fast_dLLM_Qwen"


class FastDLLMQwenForCausalLM(Qwen2ForCausalLM):
    """The causal-LM class under the model_type that the checkpoints' config.json states."""

    config_class = FastDLLMQwenConfig
    config: FastDLLMQwenConfig


FAMILIES.add(
    Family(
        "fast_dllm_v2",
        (
            Variant(
                "Fast_dLLM_Qwen",
                FastDLLMQwenConfig,
                FastDLLMQwenForCausalLM,
                checkpoints="Fast_dLLM_v2 1.5B, 7B",
            ),
        ),
        keys=DECODER
        | {
            "rope_scaling": ROPE,
            "rope_parameters": ROPE,
            "partial_rotary_factor": only(1.0),
            "use_mrope": only(False),
            "use_sliding_window": NO_WINDOW,
            "sliding_window": size(10**9),  # unused without use_sliding_window
            "layer_types": FULL_ATTENTION,
            "bd_size": size(),  # the block size
            "conplemenrary_mask": SWITCH,  # so written; nothing reads it
        },
        logit_shift=1,
        shifts_within_views=True,
        block_size=32,
        block_size_key="bd_size",
        block_size_in_config=True,
        special=SpecialTokens(mask=151665, eos=151645),
    )
)
