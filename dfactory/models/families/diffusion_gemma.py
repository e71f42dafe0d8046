"""DiffusionGemma (26B-A4B): causal context, a canvas per block, uniform noise, self-conditioning. Text only.

Facts: docs/families.md#diffusiongemma. transformers runs an encoder over the clean tokens and a decoder over the canvas.
They share every weight but one number per layer, `layer_scalar`, and differ in their input: a canvas token gets the
model's last prediction of it (self-conditioning) and a norm. So one stack runs over `[clean | views]` here; each token
takes the number and the input of its stream. Names are the original ones.
"""

import torch
from torch import nn
from transformers import DiffusionGemmaConfig as OriginalConfig
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaDecoderModel,
    DiffusionGemmaDecoderTextLayer,
    DiffusionGemmaEncoderTextAttention,
    DiffusionGemmaPreTrainedModel,
)

from dfactory.models.config_keys import DECODER, POSITIVE, Rule, Rules, only, size
from dfactory.models.families.base import FAMILIES, Attention, Family, InSGLang, Noise, SpecialTokens, Variant

VISION = r"^model\.encoder\.(vision_tower|embed_vision)\."  # not computed here, and saved as they were read


_OF_LAYERS = ("head_dim", "num_key_value_heads")  # differ between layers: the largest
_OTHER_NAMES = {"num_experts_per_tok": "top_k_experts", "num_local_experts": "num_experts"}


class DiffusionGemmaConfig(OriginalConfig):
    """The original config; what is asked of it is asked of its text part, under the names that other decoders use."""

    def __getattr__(self, name):
        if "text_config" not in self.__dict__ or name.startswith("_"):
            raise AttributeError(name)
        text = self.text_config
        if name in _OF_LAYERS:
            return max(getattr(text.per_layer_config[layer], name) for layer in range(text.num_hidden_layers))
        return getattr(text, _OTHER_NAMES.get(name, name))


class DiffusionGemmaLayer(DiffusionGemmaDecoderTextLayer):
    """The layer with a scalar for each token."""

    def forward(self, hidden_states, scalar_RS1=None, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), attention_mask=None, **kwargs)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(hidden_states)))
        flat = hidden_states.flatten(0, 1)
        _, weights, experts = self.router(flat)
        routed = self.experts(self.pre_feedforward_layernorm_2(flat), experts, weights).view_as(hidden_states)
        both = dense + self.post_feedforward_layernorm_2(routed)
        return (hidden_states + self.post_feedforward_layernorm(both)) * scalar_RS1


class Scalar(nn.Module):
    """What the encoder has of its own in a layer."""

    def __init__(self):
        super().__init__()
        self.layer_scalar = nn.Buffer(torch.ones(1))


class Backbone(nn.Module):
    """Encoder and decoder in one stack."""

    def __init__(self, config: DiffusionGemmaConfig):
        super().__init__()
        self.config = config.text_config
        self.decoder = DiffusionGemmaDecoderModel(config)
        self.encoder = nn.Module()
        self.encoder.language_model = nn.Module()
        self.encoder.language_model.layers = nn.ModuleList(Scalar() for _ in self.layers)
        for layer in self.layers:
            layer.__class__ = DiffusionGemmaLayer
            layer.self_attn.__class__ = DiffusionGemmaEncoderTextAttention  # the one that fills a cache

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    def forward(
        self, input_ids, position_ids, visibility, past_key_values=None, conditioning_RSH=None, use_cache=False
    ) -> BaseModelOutputWithPast:
        """`visibility.noised_RS` says which tokens are in a view; `conditioning_RSH` is the expected embedding of each of
        those by the last prediction, without its scale, and 0 where there was none."""
        noised_RS1, embed = visibility.noised_RS[..., None], self.decoder.embed_tokens
        embedded = embed(input_ids)
        signal = (
            torch.zeros_like(embedded)
            if conditioning_RSH is None
            else conditioning_RSH * embed.embed_scale.to(embedded.dtype)
        )
        hidden = torch.where(noised_RS1, self.decoder.self_conditioning(embedded, signal), embedded)
        kinds = self.config.layer_types
        turned = {kind: self.decoder.rotary_emb(hidden, position_ids, kind) for kind in set(kinds)}
        for kind, layer, clean in zip(kinds, self.layers, self.encoder.language_model.layers, strict=True):
            hidden = layer(
                hidden,
                scalar_RS1=torch.where(noised_RS1, layer.layer_scalar, clean.layer_scalar),
                position_embeddings=turned[kind],
                past_key_values=past_key_values,
                visibility=visibility,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.decoder.norm(hidden), past_key_values=past_key_values)


class DiffusionGemma(DiffusionGemmaForBlockDiffusion):
    """The original class around one stack, without its vision tower."""

    config_class = DiffusionGemmaConfig
    config: DiffusionGemmaConfig
    _keys_to_ignore_on_load_unexpected = (VISION,)

    def __init__(self, config: DiffusionGemmaConfig):
        DiffusionGemmaPreTrainedModel.__init__(self, config)  # the class's own would make both stacks
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.decoder.embed_tokens

    def adjust_generation_fn(self, *args, **kwargs):
        """Leave generation_config.json alone: its class would refuse keys of others in it."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """peft looks for it in every decoder. Responses are decoded in decoding/."""
        raise NotImplementedError


_LAYER_TYPES = ("sliding_attention", "full_attention")

_TEXT: Rules = DECODER | {
    "hidden_act": only("gelu_pytorch_tanh"),
    "hidden_activation": only("gelu_pytorch_tanh"),
    "attention_bias": only(False),
    "final_logit_softcapping": POSITIVE,
    "sliding_window": size(10**9),
    "layer_types": Rule(
        lambda value: isinstance(value, list) and set(value) <= set(_LAYER_TYPES) and value[-1:] == ["full_attention"],
        f"a list of {' and '.join(_LAYER_TYPES)} that ends in full_attention",
    ),
    "use_bidirectional_attention": only("vision"),
    "num_experts": size(10_000),
    "top_k_experts": size(10_000),
    "moe_intermediate_size": size(),
    "enable_moe_block": only(True),
    "attention_k_eq_v": only(True),
    "hidden_size_per_layer_input": only(0),
    "num_kv_shared_layers": only(0),
    "use_double_wide_mlp": only(False),
    "global_head_dim": size(10_000),  # as the hub's config.json has it
    "num_global_key_value_heads": size(10_000),
    "per_layer_config": Rule(  # as transformers 5.23 writes the same
        lambda value: (
            isinstance(value, dict)
            and all(
                isinstance(keys, dict) and set(keys) <= {"head_dim", "num_key_value_heads"} for keys in value.values()
            )
        ),
        "head_dim and num_key_value_heads of layers",
    ),
    "rope_parameters": Rule(
        lambda value: (
            isinstance(value, dict)
            and set(value) <= set(_LAYER_TYPES)
            and all(
                isinstance(keys, dict) and keys.get("rope_type", "default") in ("default", "proportional")
                for keys in value.values()
            )
        ),
        f"rope_type default or proportional for {' and '.join(_LAYER_TYPES)}",
    ),
}

FAMILIES.add(
    Family(
        "diffusion_gemma",
        (
            Variant(
                "diffusion_gemma",
                DiffusionGemmaConfig,
                DiffusionGemma,
                checkpoints="diffusiongemma-26B-A4B-it, text",
                in_sglang=InSGLang(DiffusionGemmaForBlockDiffusion.__name__, mask=None),
            ),
        ),
        keys={
            "text_config": _TEXT,
            "vision_config": Rule(lambda value: isinstance(value, dict), "it must be an object"),  # not computed
            "audio_config": only({}),
            "boi_token_id": size(10**7),
            "eoi_token_id": size(10**7),
            "image_token_id": size(10**7),
            "canvas_length": size(10**6),
            "tie_word_embeddings": only(True),
        },
        attention=Attention.CAUSAL_CONTEXT,
        noise=Noise.UNIFORM,
        block_size=256,
        block_size_key="canvas_length",
        block_size_in_config=True,  # its generation_config.json may hold no key that its own class does not know
        special=SpecialTokens(eos=1),
        moe_blocks=(DiffusionGemmaLayer.__name__,),
        last_layer_at_targets=False,
        carried=VISION,
    )
)
