"""Keys of the decoder: those that every rule has here, and those of the rules; `decode.threshold=0.9` on the command line,
`decode:` in a recipe. How they are read, and what does not go together.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional, get_args, get_origin

from dfactory.config.elsewhere import without_neutral
from dfactory.config.keys import key
from dfactory.config.load import (
    COMMAND_LINE,
    check_values,
    known_keys,
    merge_layers,
    parse_overrides,
    refuse_unknown_keys,
)
from dfactory.config.owners import combine, default_of, key_names, refuse_foreign
from dfactory.decoding.rules.base import CONFIDENCE, RULES, DecodingRule, default_rule
from dfactory.errors import ConfigError

RuleKeys: Any = combine("RuleKeys", RULES, __name__)


@dataclass
class DecoderKeys:
    block_size: Optional[int] = key(
        None,
        "tokens denoised together; null: as the model was trained, else 32, or with full attention all of max_new_tokens; "
        "in a recipe, its block_size",
        low=1,
    )
    max_new_tokens: int = key(512, "longest response, EOS included", low=1)
    answer_ranges: Optional[str] = key(
        None,
        "which token range (token_ranges) each position of an answer holds, from its first: action*4 is four tokens of the "
        "range `action`, then text; `text*2, action*4`; `action` without a count goes to the end; null: text alone",
    )
    rule: str = key(
        default_rule().name,
        "which masks become tokens at each forward; the keys of the other rules have to stay at their defaults "
        "(docs/decoding.md)",
        choices=RULES.names,
    )
    sub_block_size: Optional[int] = key(
        None,
        "commit the masks of one part of a block before those of the next, parts of so many tokens from left to right; the "
        "rule sees each part as a block, later parts stay in sight as masks (Fast-dLLM v2's small blocks); null: off",
        low=1,
    )
    sub_block_cache: bool = key(
        False,
        "run a part's later forwards over that part alone, with the other parts' keys as of its first forward; approximate",
    )
    blocks_from: str = key(
        "start",
        "where block-causal blocks are counted from. start: the start of the document, as in training; prompt: such that "
        "one begins where the prompt ends, and the document's first and last block may be short (dllm's BD3LM sampler)",
        choices=("start", "prompt"),
    )
    early_stop: bool = key(
        False,
        "end a response as soon as no mask is left before its EOS, or in it up to max_new_tokens, and leave the other masks "
        "of the block; false: decode the block to its end",
    )
    eos_penalty: float = key(
        0.0,
        "multiply the confidence of EOS by a factor that rises linearly over the forwards of a block, from 1 - eos_penalty "
        "at the first to 1 at the last and wherever no mask is left. The last is the latest that the rule can need, "
        "although a block may need fewer. EOS means the token whose probability acceptance compares, or which an edit "
        "writes. What is drawn and its log-probability stay as they are; 0.0: off",
        low=0.0,
        high=1.0,
    )
    defer_eos: bool = key(
        False,
        "commit EOS and stop_token_ids last: confidence 0 where one of them is proposed, elsewhere the probability among "
        "the other tokens; LLaDA's confidence_eos_eot_inf",
    )
    min_new_tokens: int = key(
        0,
        "no EOS and none of stop_token_ids at the first so many positions of a response; max_new_tokens: nowhere in it, as "
        "LLaDA's logits_eos_inf",
        low=0,
    )
    stop_token_ids: Optional[list[int]] = key(
        None,
        "further ids that end a response, such as the end of a turn, where they follow no mask; null: what the checkpoint's "
        "generation_config.json lists as eos_token_id",
    )
    cfg_scale: float = key(
        0.0,
        "classifier-free guidance: logits + cfg_scale times what the prompt adds to them, for a second forward with the "
        "prompt masked; full attention only; 0: off",
        low=0.0,
    )
    editing_threshold: Optional[float] = key(
        None,
        "replace a visible response token when the probability of the one drawn exceeds this (acceptance top: never the "
        "most probable one); null: off; 0.0: whenever another one is drawn",
        low=0.0,
        high=1.0,
    )
    max_post_steps: int = key(16, "forwards that a block without masks may go on editing", low=0)
    temperature: float = key(0.0, "0: greedy", low=0.0)
    top_k: Optional[int] = key(None, "sample among the k most likely", low=1)
    top_p: Optional[float] = key(None, "sample among the most likely that hold this mass", low=0.0, high=1.0)
    acceptance: str = key(
        "sampled",
        "compare the sampled token's own probability, or the top probability (keeps the distribution)",
        choices=("sampled", "top"),
    )
    suppress_special: bool = key(
        True, "never emit the mask and other special tokens, EOS apart; false: as LLaDA2's own code"
    )
    cuda_graphs: bool = key(
        False,
        "denoising forwards of few fixed shapes, which a GPU replays instead of launching thousands of kernels from "
        "Python; needs 16 bits there; on a CPU the shapes alone",
    )
    compile: bool = key(
        False,
        "forwards of block-causal models as code that torch.compile makes once for a model, in half a minute or more; on a "
        "CPU it needs a C++ compiler (g++); tokens are the same, log-probabilities up to rounding",
    )
    batch_size: int = key(32, "slots decoded together; a finished response frees its slot", low=1)
    seed: int = key(0, "of the sampling, per prompt", low=0, high=2**63 - 1)
    full_attention: Optional[bool] = key(
        None,
        "for models whose weights serve with full and with block-causal attention: which one; null: as the model was "
        "trained; in a recipe, its block_size says it",
    )
    mask_token_id: Optional[int] = key(None, "null: ask the tokenizer")
    eos_token_id: Optional[int] = key(None, "null: ask the tokenizer")


_TAKEN = {field.name for field in dataclasses.fields(DecoderKeys)} & {
    field.name for field in dataclasses.fields(RuleKeys)
}
if _TAKEN:
    raise ConfigError(f"a decoding rule declares {', '.join(_TAKEN)}, which every rule has: give its key another name")


@dataclass
class DecodeKeys(RuleKeys, DecoderKeys):
    """One flat group; `rule` selects whose keys are valid."""

    def in_blocks_of(self, trained: int | None) -> "DecodeKeys":
        """The same with a block size: their own, else that of training, else the longest response (full attention, whose
        canvas is a single block then)."""
        return dataclasses.replace(self, block_size=self.block_size or trained or self.max_new_tokens)


def rule_of(keys: DecodeKeys) -> DecodingRule:
    return RULES[keys.rule].of(keys)


def load_decode_keys(overrides: list[str]) -> DecodeKeys:
    """`decode.threshold=0.9 ...` -> DecodeKeys; the prefix may be left out."""
    layer = parse_overrides([item.removeprefix("--").removeprefix("decode.") for item in overrides])
    keys = merge_layers(DecodeKeys, [(COMMAND_LINE, layer)])
    refuse_foreign_keys(keys, dict.fromkeys(layer, COMMAND_LINE))
    problem = decode_problem(keys, keys.block_size)
    if problem is not None:
        raise ConfigError(f"{problem} in the command line")
    return keys


def decode_keys_over(keys: DecodeKeys, values: dict[str, Any], origin: str) -> DecodeKeys:
    """`keys` with some replaced, as JSON gave them: taken as they are, never interpolated or turned into another type. Where
    the rule is replaced, the keys of the former one go back to their defaults."""
    values = without_neutral(values, known_keys(DecodeKeys))
    refuse_unknown_keys(DecodeKeys, values, origin)
    for name, field in known_keys(DecodeKeys).items():
        if name in values:
            _check_type(name, field, values[name], origin)
    changed = dataclasses.replace(keys, **values)
    check_values(changed, origin)
    refuse_foreign_keys(changed, dict.fromkeys(values, origin))
    kept = valid_keys(changed).keys() | values.keys()
    former = {field.name: default_of(field) for field in dataclasses.fields(RuleKeys) if field.name not in kept}
    changed = dataclasses.replace(changed, **former)
    problem = decode_problem(changed, changed.block_size)
    if problem is not None:
        raise ConfigError(f"{problem.replace('decode.', '')} in {origin}")
    return changed


def _check_type(name: str, field: dataclasses.Field, value: Any, origin: str) -> None:
    kinds = get_args(field.type) or (field.type,)  # of Optional[int]: int and None
    if get_origin(kinds[0]) is list:
        (kind,) = get_args(kinds[0])
        if value is None and type(None) in kinds:
            return
        if type(value) is not list or any(type(item) is not kind for item in value):
            raise ConfigError(f"{name} in {origin}: it must be a list of {kind.__name__}, is {value!r}")
        return
    kinds += (int,) * (float in kinds)
    if type(value) not in kinds:
        raise ConfigError(f"{name} in {origin}: it must be {kinds[0].__name__}, is {type(value).__name__}")


def valid_keys(keys: DecodeKeys) -> dict[str, Any]:
    """The keys that hold with the selected rule, and their values."""
    foreign = {field.name for field in dataclasses.fields(RuleKeys)} - key_names(RULES[keys.rule])
    return {name: value for name, value in dataclasses.asdict(keys).items() if name not in foreign}


def refuse_foreign_keys(keys: DecodeKeys, origins: Mapping[str, str], prefix: str = "") -> None:
    """Raise ConfigError for a given key of another rule than the selected one; `origins`: dotted key -> where it stands."""
    refuse_foreign(keys, origins, RULES, RULES[keys.rule], prefix)


def decode_problem(keys: DecodeKeys, block_size: int | None) -> str | None:
    """The first rule between keys that they break. Without a block size, the rules that need one are left out."""
    rule = rule_of(keys)
    if keys.compile and keys.cuda_graphs:
        return "decode.compile true with decode.cuda_graphs true: both replace what starts a forward; leave out one"
    if (problem := _sub_block_problem(keys, rule, block_size)) is not None:
        return problem
    block_size = keys.sub_block_size or block_size  # what the rule takes for a block
    if (problem := rule.problem(block_size)) is not None:
        return problem
    if keys.min_new_tokens > keys.max_new_tokens:
        return (
            f"decode.min_new_tokens {keys.min_new_tokens} > max_new_tokens {keys.max_new_tokens}: a response has no room "
            "for so many; lower it"
        )
    if keys.defer_eos and CONFIDENCE not in rule.reads:
        return (
            f"decode.defer_eos with {rule.selector}, which does not read the confidence that it lowers: set it to false"
        )
    if keys.eos_penalty == 0:
        return None
    penalty = f"decode.eos_penalty {keys.eos_penalty:g}"
    if CONFIDENCE not in rule.reads and keys.editing_threshold is None:
        return f"{penalty} with {rule.selector}, which does not read the confidence that it lowers: set it to 0"
    if block_size is not None and rule.most_steps(block_size) == 1:
        return (
            f"{penalty} where a block of {block_size} takes one forward: its first is its last and commits everything; set "
            "it to 0, or give the block more forwards"
        )
    return None


def _sub_block_problem(keys: DecodeKeys, rule: DecodingRule, block_size: int | None) -> str | None:
    size = keys.sub_block_size
    if size is not None and block_size is not None and block_size % size:
        return f"decode.sub_block_size {size} does not divide block_size {block_size}"
    if not keys.sub_block_cache:
        return None
    cached = "decode.sub_block_cache true"
    if size is None:
        return f"{cached} without decode.sub_block_size: a block that is one part has nothing to keep; set both, or neither"
    if keys.cuda_graphs:
        return (
            f"{cached} with decode.cuda_graphs true: its forwards have other shapes than those recorded; leave out one"
        )
    if keys.editing_threshold is not None or rule.revises:
        changes = rule.selector if rule.revises else f"decode.editing_threshold {keys.editing_threshold}"
        return f"{cached} with {changes}, which may change tokens of all parts; leave out one"
    return None


def trace_problem(keys: DecodeKeys) -> tuple[str, str] | None:
    """The key because of which the recorded probabilities do not multiply to that of a trace, and why; None where they do,
    with acceptance `top`."""
    if keys.editing_threshold is not None:
        return f"decode.editing_threshold {keys.editing_threshold}", "the likelihood of edits is not computed"
    if keys.sub_block_cache:
        return "decode.sub_block_cache true", "the keys that it keeps make the recorded probabilities approximate"
    if keys.cfg_scale:
        return f"decode.cfg_scale {keys.cfg_scale:g}", "the likelihood of a guided distribution is not computed"
    rule = RULES[keys.rule]
    if rule.revises:
        return rule.selector, "the likelihood of tokens that it takes back is not computed"
    if not rule.keeps_distribution:
        return rule.selector, "the positions that it chooses depend on what was drawn, and that is not recorded"
    return None
