"""Any decoder of transformers that passes the self-check, under its own `model_type` and without a file here.

What no family claims is looked up in transformers' table of causal language models. Its config.json must hold nothing that
the class does not know, and nothing that the visibility rule cannot follow; then a small model of the same switches is
compared with transformers' own arithmetic (dfactory/models/selfcheck). Such models are autoregressive: `stage: cpt`
converts them.
"""

import dataclasses
import functools
import inspect
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.config_keys import (
    BOOKKEEPING,
    DECODER,
    MOE,
    POSITIVE,
    ROPE,
    SWITCH,
    Rule,
    Rules,
    check_keys,
    only,
    shown,
    size,
)
from dfactory.models.families.base import FAMILIES, Attention, Family, Variant
from dfactory.models.selfcheck import UNFIT, Unfit, self_check, shrink

MOST_NUMBER = 10**9
MOST_ENTRIES = 10_000

_KNOWN_LAYERS = ("full_attention", "sliding_attention", "dense", "sparse")


def _is_bounded(value: Any) -> bool:
    """No number and no list is larger than those of any model."""
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return len(value) <= MOST_ENTRIES and all(map(_is_bounded, inner))
    return not isinstance(value, int | float) or abs(value) <= MOST_NUMBER


_COMPUTED = Rule(_is_bounded, f"its numbers must be below {MOST_NUMBER:,} and its lists shorter than {MOST_ENTRIES:,}")
_NO_NOISE = Rule(
    lambda value: value in (0, 0.0), "two passes over one batch must agree, so nothing is dropped: set it to 0"
)


def _is_static(value: Any) -> bool:
    """Of rope_parameters: those of all layers, or of each kind of layer."""
    nested = [part for part in value.values() if isinstance(part, dict)] if isinstance(value, dict) else []
    return all(ROPE.holds(part) for part in nested or [value])


# Keys that every class takes beside its own.
_COMMON: Rules = {
    "rope_theta": DECODER["rope_theta"],
    "rope_scaling": ROPE,
    "rope_parameters": Rule(_is_static, ROPE.words),
    "is_encoder_decoder": only(False),
    "add_cross_attention": only(False),
    "tie_encoder_decoder": only(False),
    "chunk_size_feed_forward": only(0),
    "pruned_heads": only({}),
    "cross_attention_hidden_size": only(None),
}
# Keys of public checkpoints that some classes do not read, because only one value is computed: with that value they say
# nothing new. A bias is a tensor, so that the headers of the weights tell whether there is one.
_WITHOUT_A_PART: Rules = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "attention_out_bias", "use_bias", "lm_head_bias"), SWITCH),
    **dict.fromkeys(("ep_size", "moe_layer_freq", "interpolate_factor", "full_attn_mod"), only(1)),
    "use_mrope": only(False),
    "pretraining_tp": size(1_000),  # the same products in slices
    "partial_rotary_factor": only(1.0),
    "attention_dropout": only(0.0),
    "num_nextn_predict_layers": size(1_000, least=0),
}
_READ = re.compile(r"""config\.(\w+)|config,\s*["'](\w+)["']""")  # how modeling code names a key
_TRANSIENT = {n for n in BOOKKEEPING if not n.endswith("_token_id") and n != "max_position_embeddings"}
_SIZES: Rules = {
    name: rule for name, rule in (DECODER | MOE).items() if name not in ("hidden_act", "attention_dropout")
}


def rules_of(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Rules:
    """What the keys of its config.json may be: the fields of the configuration class, under either of their names, what it
    makes of them, and what the code of the model reads."""
    source = inspect.getsource(sys.modules[model_class.__module__])
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class().to_dict())
    names |= {first or second for first, second in _READ.findall(source)}
    if "partial_rotary_factor" in source:  # it moves into rope_parameters, which only some read it from
        names.add("partial_rotary_factor")
    rules = _WITHOUT_A_PART | _router_rules(source) | {name: _rule(name) for name in names - BOOKKEEPING} | _COMMON
    aliases = {alias: rules[name] for alias, name in config_class.attribute_map.items() if name in rules}
    return aliases | rules


def _router_rules(source: str) -> Rules:
    """Of keys that name the router, where the class has only one: its correction tells the two kinds apart."""
    corrected = "e_score_correction_bias" in source
    return {
        "scoring_func": only("sigmoid" if corrected else "softmax"),
        "topk_method": only("noaux_tc" if corrected else "greedy"),
    }


def _rule(name: str) -> Rule:
    if any(part in name for part in ("dropout", "pdrop", "jitter")) and "classifier" not in name:
        return _NO_NOISE
    if name == "partial_rotary_factor":
        return POSITIVE
    return _SIZES.get(name, _COMPUTED)


class Decoders:
    """Families made on demand, out of transformers' table."""

    def claim(self, file: Path, keys: Mapping[str, Any]) -> tuple[Family, Variant] | None:
        """None where transformers has no causal language model of that model_type. Raises CheckpointError for one that does
        not pass."""
        model_type = keys.get("model_type")
        _refuse_other_kinds(file, keys)
        if model_type not in CONFIG_MAPPING:
            return None
        config_class = CONFIG_MAPPING[model_type]
        model_class = _model_class(config_class)
        if model_class is None:
            raise ConfigError(
                f"model_type {model_type!r} in {file}: transformers has no causal language model of it; dFactory trains "
                "decoders of text"
            )
        _refuse_composite(file, keys, config_class)
        _refuse_other_head(file, keys, config_class, model_class)
        check_keys(file, keys, rules_of(config_class, model_class))
        try:
            config = config_class.from_dict(dict(keys))
        except UNFIT as problem:
            raise CheckpointError(f"{file} is refused by transformers: {problem}") from problem
        _refuse_layers(file, config)
        try:
            return self.of(config), self.variant_of(config)
        except Unfit as reason:
            raise CheckpointError(
                f"model_type {model_type!r} in {file} does not pass the self-check: {reason}; docs/families.md says what is "
                "checked, and how a family file declares another class"
            ) from reason

    def of(self, config: PreTrainedConfig) -> Family:
        """Raises Unfit where it does not pass."""
        covered = _window(config) >= _longest(config)
        try:
            small = shrink(config.to_dict(), config.attribute_map, keep_windows=covered)
        except UNFIT as problem:
            raise Unfit(f"no small configuration can be made of it: {problem!r}") from problem
        computed = {name: value for name, value in small.items() if name not in _TRANSIENT}
        return _family(type(config), json.dumps(computed, sort_keys=True, default=str), covered)

    def variant_of(self, config: PreTrainedConfig) -> Variant:
        return _variant(type(config))


def _model_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    if config_class not in AutoModelForCausalLM._model_mapping:
        return None
    found = AutoModelForCausalLM._model_mapping[config_class]
    return found[-1] if isinstance(found, tuple) else found


@functools.cache
def _variant(config_class: type[PreTrainedConfig]) -> Variant:
    return Variant(config_class.model_type, config_class, _model_class(config_class))


@functools.cache
def _family(config_class: type[PreTrainedConfig], small: str, covered: bool) -> Family:
    """The family of a configuration whose small form is this. Checked once in a process."""
    variant = _variant(config_class)
    family = Family(
        config_class.model_type,
        (variant,),
        keys=rules_of(config_class, variant.model_class),
        attention=Attention.BY_BLOCK_SIZE,
        autoregressive=True,
    )
    try:
        config = config_class.from_dict(json.loads(small))
    except UNFIT as problem:
        raise Unfit(f"a small configuration of it cannot be made: {problem}") from problem
    checked = self_check(config, variant.model_class, family, window_allowed=covered)
    return dataclasses.replace(
        family,
        moe_blocks=checked.moe_blocks,
        saved_keys=_saved_keys,
        warnings=_warnings,
        logit_scale=checked.logit_scale,
        last_layer_at_targets=checked.last_layer_at_targets,
        checked=(
            f"{variant.model_class.__name__} of transformers, which no family declares, passes the self-check",
            *checked.found,
            *(["its sliding window is as long as the longest sequence, so nothing is hidden"] if covered else []),
        ),
    )


def _saved_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Multi-token-prediction layers, which transformers' classes leave out, are not announced."""
    return keys | ({"num_nextn_predict_layers": 0} if keys.get("num_nextn_predict_layers") else {})


def _warnings(config: PreTrainedConfig) -> list[str]:
    layers = getattr(config, "num_nextn_predict_layers", None)
    return [f"{layers} multi-token-prediction layer(s) are neither read nor saved"] if layers else []


# --- what config.json alone refuses ------------------------------------------------------------------------------------


def _refuse_other_kinds(file: Path, keys: Mapping[str, Any]) -> None:
    for name, what in (("is_encoder_decoder", "an encoder and a decoder"), ("add_cross_attention", "cross attention")):
        if keys.get(name):
            raise CheckpointError(
                f"{name} {shown(keys[name])} in {file} is not supported: a model with {what} is no decoder of one stream; "
                "take a decoder-only checkpoint"
            )


def _refuse_composite(file: Path, keys: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> None:
    parts = [name for name in config_class.sub_configs if name in keys] or list(config_class.sub_configs)
    if parts:
        raise CheckpointError(
            f"{parts[0]} in {file}: model_type {keys['model_type']} has parts of its own ({', '.join(parts)}), for images, "
            "sound or a nested model, which are not read here; take the checkpoint of the text model alone"
        )


def _refuse_other_head(file, keys: Mapping[str, Any], config_class, model_class) -> None:
    """A class of another module is transformers' own word for what computes the checkpoint."""
    stated = keys.get("architectures") or [model_class.__name__]
    own = config_class.__module__.rpartition(".")[0] == model_class.__module__.rpartition(".")[0]
    if own and model_class.__name__ not in stated:
        raise CheckpointError(
            f"architectures {shown(stated)} in {file}: transformers' causal language model of model_type "
            f"{keys['model_type']} is {model_class.__name__}; another head, or other code, is not read here"
        )


def _window(config: PreTrainedConfig) -> int:
    return getattr(config, "sliding_window", None) or 0


def _longest(config: PreTrainedConfig) -> int:
    return getattr(config, "max_position_embeddings", None) or MOST_NUMBER


def _refuse_layers(file: Path, config: PreTrainedConfig) -> None:
    """Layers that are not full attention: of another kind, or with a window that hides part of the clean past."""
    types = getattr(config, "layer_types", None) or []
    for name in types:
        if name not in _KNOWN_LAYERS:
            raise CheckpointError(
                f"layer_types with {name} in {file} is not supported: block diffusion attends to the whole clean past, and "
                "state-space, linear, chunked and sparse layers do not; take a model of full_attention layers"
            )
    window, limit = _window(config), _longest(config)
    used = "sliding_attention" in types if types else bool(window)
    if used and window < limit:
        raise CheckpointError(
            f"sliding_window {window} in {file} is not supported: block diffusion attends to the whole clean past, and with "
            f"max_position_embeddings {limit} the window hides part of it; take a model of full attention, or set "
            "sliding_window to null if the checkpoint was trained without"
        )


FAMILIES.others = Decoders()
