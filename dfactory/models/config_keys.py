"""Which keys of a config.json are computed: everything else is refused by name.

An ignored key gives a model that nobody trained: without `expert_capacity`, for example, the router is another one. So
this is a list of what is known, not of what is forbidden. A known key either has no part in the arithmetic
(BOOKKEEPING), or a rule of its family that says which of its values the family's modules compute: families build theirs
from DECODER and MOE. A key that is null counts as absent.

Sizes are bounded, because a model is built on the meta device before any weight is read: that takes no memory for
parameters, but time and Python objects for layers.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dfactory.errors import CheckpointError

MOST_BYTES = 2**20  # of config.json and its like
MOST_TOKENIZER_BYTES = 2**27  # of tokenizer.json; vocabularies of 256,000 tokens take 35 MB
MOST_ADDED_TOKENS = 2**16


class Rule(NamedTuple):
    """What a key's value has to be."""

    holds: Callable[[Any], bool]
    words: str


Rules = Mapping[str, "Rule | Rules"]  # of an object, the rules of its keys


def only(*values: Any) -> Rule:
    return Rule(lambda value: value in values, f"only {' or '.join(map(repr, values))} is supported")


def size(most: int = 10**6, least: int = 1) -> Rule:
    return Rule(lambda v: type(v) is int and least <= v <= most, f"it must be a whole number from {least} to {most:,}")


def _is_static_rope(value: Any) -> bool:
    """Rotation whose frequencies do not depend on how long a row happens to be."""
    return isinstance(value, dict) and value.get("rope_type", value.get("type", "default")) in STATIC_ROPES


STATIC_ROPES = ("default", "linear", "llama3", "yarn")
ANYTHING = Rule(lambda value: True, "any value is")
SWITCH = Rule(lambda value: isinstance(value, bool), "it must be true or false")
POSITIVE = Rule(
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf,
    "it must be a number above 0",
)
ROPE = Rule(_is_static_rope, f"its rope_type must be one of {', '.join(STATIC_ROPES)}")
DEFAULT_ROPE = Rule(lambda v: isinstance(v, dict) and v.get("rope_type") == "default", "its rope_type must be default")
FULL_ATTENTION = Rule(
    lambda value: isinstance(value, list) and set(value) <= {"full_attention"},
    "block diffusion attends to the whole clean past: only full_attention is supported",
)
LAYERS = Rule(
    lambda value: isinstance(value, list) and all(type(layer) is int for layer in value), "it must be a list of layers"
)
NO_WINDOW = Rule(lambda value: value is False, "block diffusion attends to the whole clean past: set it to false")

# Of transformers, of training elsewhere, and defaults of generation: without a part in the arithmetic.
_BOOKKEEPING = """
architectures auto_map model_type dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash
_attn_implementation attn_implementation _attn_implementation_autoset _experts_implementation torchscript
use_cache cache_implementation initializer_range gradient_checkpointing use_bfloat16 tf_legacy_loss
unsloth_fixed unsloth_version
bos_token_id eos_token_id sep_token_id cls_token_id unk_token_id mask_token_id decoder_start_token_id tokenizer_class
output_attentions output_hidden_states output_router_logits output_scores return_dict return_dict_in_generate
id2label label2id problem_type finetuning_task task_specific_params prefix is_decoder
router_aux_loss_coef aux_loss_alpha seq_aux mtp_loss_scaling_factor max_position_embeddings max_window_layers
block_size temperature top_k top_p typical_p do_sample num_beams num_beam_groups diversity_penalty early_stopping
length_penalty repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size max_length min_length
num_return_sequences bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty
"""
BOOKKEEPING = frozenset(_BOOKKEEPING.split())

DECODER: Rules = {
    "vocab_size": size(10**7),
    "hidden_size": size(),
    "intermediate_size": size(),
    "num_hidden_layers": size(1_000),
    "num_attention_heads": size(10_000),
    "num_key_value_heads": size(10_000),
    "head_dim": size(10_000),
    "hidden_act": only("silu"),
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "tie_word_embeddings": SWITCH,
    "pad_token_id": size(10**7, least=-1),
    "attention_dropout": only(0.0),
    "is_encoder_decoder": only(False),
    "add_cross_attention": only(False),
    "tie_encoder_decoder": only(False),
    "chunk_size_feed_forward": only(0),
    "pruned_heads": only({}),
}

MOE: Rules = {
    "num_experts": size(10_000),
    "num_experts_per_tok": size(10_000),
    "moe_intermediate_size": size(),
    "norm_topk_prob": SWITCH,
}


def check_keys(file: Path, keys: Mapping[str, Any], rules: Rules) -> None:
    """Raise CheckpointError for a key that the family does not know, a value that it does not compute, and sizes that do
    not go together."""
    refuse_values(file, keys, rules, BOOKKEEPING, f"model_type {keys.get('model_type')}")
    stated = stated_keys(keys)
    for holds, words in _RELATIONS:
        if not holds(stated):
            raise CheckpointError(
                f"{words} in {file}: {shown({k: stated.get(k) for k in words.split() if k in rules})}"
            )


def refuse_values(file: Path, keys: Mapping[str, Any], rules: Rules, ignored: Collection[str], whose: str) -> None:
    """Raise CheckpointError for the first key without a rule that is not ignored either, or whose rule does not hold."""
    for name, value in stated_keys(keys).items():
        rule = rules.get(name)
        if isinstance(rule, Mapping) and isinstance(value, dict):
            refuse_values(file, value, rule, ignored, f"{name} of {whose}")
            continue
        if isinstance(rule, Mapping):
            raise CheckpointError(f"{name} {shown(value)} in {file} is not supported: it must be an object")
        if rule is None and name not in ignored:
            raise CheckpointError(
                f"{name} {shown(value)} in {file}: {whose} has no such key here, and it may change what the model computes; "
                "remove it if it does not"
            )
        if rule is not None and not rule.holds(value):
            raise CheckpointError(f"{name} {shown(value)} in {file} is not supported: {rule.words}")


def stated_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not null."""
    return {name: value for name, value in keys.items() if value is not None}


def read_object(file: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """A JSON file of settings. Raises CheckpointError where it is none, or larger than any is."""
    if file.stat().st_size > most_bytes:
        raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes: at most {most_bytes:,} are read")
    try:
        keys = json.loads(file.read_text())
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{file} is not a JSON object: {problem}") from problem
    if not isinstance(keys, dict):
        raise CheckpointError(f"{file} is not a JSON object: it holds a {type(keys).__name__}")
    return keys


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _related(*names: str, holds: Callable[..., bool]) -> Callable[[dict[str, Any]], bool]:
    """A relation of sizes; it holds where one of them is not stated."""
    return lambda sizes: any(name not in sizes for name in names) or holds(*(sizes[name] for name in names))


_RELATIONS: list[tuple[Callable[[dict[str, Any]], bool], str]] = [
    (
        _related("num_attention_heads", "num_key_value_heads", holds=lambda heads, keys: heads % keys == 0),
        "num_attention_heads is no multiple of num_key_value_heads",
    ),
    (
        _related("hidden_size", "num_attention_heads", holds=lambda hidden, heads: heads <= hidden),
        "num_attention_heads exceeds hidden_size",
    ),
    (
        _related("n_heads", "n_kv_heads", holds=lambda heads, keys: heads % keys == 0),
        "n_heads is no multiple of n_kv_heads",
    ),
    (
        _related("d_model", "n_heads", holds=lambda hidden, heads: hidden % heads == 0),
        "d_model is no multiple of n_heads",
    ),
    (
        _related("embedding_size", "vocab_size", holds=lambda rows, size: rows >= size),
        "embedding_size is below vocab_size",
    ),
    (_related("head_dim", holds=lambda head: head % 2 == 0), "head_dim is odd, and rotation needs pairs"),
    (
        _related("num_experts", "num_experts_per_tok", holds=lambda experts, chosen: chosen <= experts),
        "num_experts_per_tok exceeds num_experts",
    ),
    (
        _related("num_experts", "n_group", holds=lambda experts, groups: experts % groups == 0),
        "num_experts is no multiple of n_group",
    ),
    (_related("n_group", "topk_group", holds=lambda groups, kept: kept <= groups), "topk_group exceeds n_group"),
    (_related("pad_token_id", "vocab_size", holds=lambda pad, size: pad < size), "pad_token_id is no id of vocab_size"),
]
