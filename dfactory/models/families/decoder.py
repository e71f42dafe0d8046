"""Decoders of transformers as they are, run as block-diffusion models: Qwen3, Qwen3-MoE, Llama.

Their public checkpoints are autoregressive, so `stage: cpt` comes first. Names of keys and tensors are transformers' own.
"""

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dfactory.models.config_keys import (
    DECODER,
    FULL_ATTENTION,
    LAYERS,
    MOE,
    NO_WINDOW,
    ROPE,
    SWITCH,
    Rules,
    only,
    size,
)
from dfactory.models.families.base import FAMILIES, Attention, Family, Variant

LLAMA: Rules = DECODER | {
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
    "pretraining_tp": only(1),
    "partial_rotary_factor": only(1.0),
}

QWEN3: Rules = DECODER | {
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "attention_bias": SWITCH,
    "partial_rotary_factor": only(1.0),
    "use_sliding_window": NO_WINDOW,
    "sliding_window": size(10**9),  # unused without use_sliding_window
    "layer_types": FULL_ATTENTION,
}

QWEN3_MOE: Rules = (
    QWEN3
    | MOE
    | {
        "num_local_experts": size(10_000),  # as transformers writes num_experts
        "decoder_sparse_step": size(1_000),
        "mlp_only_layers": LAYERS,
    }
)

QWEN3_MOE_AUTOEP = {
    "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
    "score_func": "softmax",
    "score_apply": "post",
    "num_experts_attr": "num_experts",
    "has_shared_experts": False,
}

FAMILIES.add(
    Family(
        "qwen3",
        (Variant("qwen3", Qwen3Config, Qwen3ForCausalLM, checkpoints="Qwen3 dense, autoregressive"),),
        keys=QWEN3,
        attention=Attention.BY_BLOCK_SIZE,
        autoregressive=True,
    )
)
FAMILIES.add(
    Family(
        "qwen3_moe",
        (
            Variant(
                "qwen3_moe", Qwen3MoeConfig, Qwen3MoeForCausalLM, checkpoints="Qwen3 mixture of experts, autoregressive"
            ),
        ),
        keys=QWEN3_MOE,
        attention=Attention.BY_BLOCK_SIZE,
        autoregressive=True,
        moe_blocks=("Qwen3MoeSparseMoeBlock",),
        autoep=QWEN3_MOE_AUTOEP,
    )
)
FAMILIES.add(
    Family(
        "llama",
        (Variant("llama", LlamaConfig, LlamaForCausalLM, checkpoints="Llama, autoregressive"),),
        keys=LLAMA,
        attention=Attention.BY_BLOCK_SIZE,
        autoregressive=True,
    )
)
