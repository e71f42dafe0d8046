"""dllm's diffusion models made of autoregressive ones: Qwen2, Qwen3 and Llama with full or block-causal attention.

Facts: docs/families.md#a2d. The weights say nothing of the attention: MDLM checkpoints have the full one, which is the
default, BD3LM checkpoints the block-causal one. Names of keys and tensors are those of the base models.
"""

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dfactory.models.families.base import FAMILIES, Attention, Family, Variant
from dfactory.models.families.decoder import LLAMA, QWEN3


class A2DLlamaConfig(LlamaConfig):
    model_type = "a2d-llama"


class A2DLlamaLMHeadModel(LlamaForCausalLM):
    """The causal-LM class under the name that the checkpoints' config.json states."""

    config_class = A2DLlamaConfig
    config: A2DLlamaConfig


class A2DQwen2Config(Qwen2Config):
    model_type = "a2d-qwen2"


class A2DQwen2LMHeadModel(Qwen2ForCausalLM):
    config_class = A2DQwen2Config
    config: A2DQwen2Config


class A2DQwen3Config(Qwen3Config):
    model_type = "a2d-qwen3"


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    config_class = A2DQwen3Config
    config: A2DQwen3Config


FAMILIES.add(
    Family(
        "a2d",
        (
            Variant("a2d-llama", A2DLlamaConfig, A2DLlamaLMHeadModel, checkpoints="dllm's Llama, MDLM and BD3LM"),
            Variant("a2d-qwen2", A2DQwen2Config, A2DQwen2LMHeadModel, checkpoints="dllm's Qwen2.5, MDLM and BD3LM"),
            Variant("a2d-qwen3", A2DQwen3Config, A2DQwen3LMHeadModel, checkpoints="dllm's Qwen3, MDLM and BD3LM"),
        ),
        keys=LLAMA | QWEN3,
        attention=Attention.BY_BLOCK_SIZE,
        block_size=None,
    )
)
