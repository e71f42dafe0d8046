"""Mistral without a sliding window, as a block-diffusion model."""

from transformers import MistralConfig, MistralForCausalLM

from dfactory.models.config_keys import DECODER, NO_WINDOW, ROPE, only
from dfactory.models.families.base import FAMILIES, Family, Variant

FAMILIES.add(
    Family(
        "mistral",
        (Variant("mistral", MistralConfig, MistralForCausalLM, checkpoints="Mistral, autoregressive"),),
        keys=DECODER
        | {
            "rope_scaling": ROPE,
            "rope_parameters": ROPE,
            "sliding_window": NO_WINDOW,
            "partial_rotary_factor": only(1.0),
        },
        autoregressive=True,
    )
)
