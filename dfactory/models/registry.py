"""From a model directory to a Policy: how a checkpoint of a known family is read.

Weights come from safetensors only, code from transformers only: a directory's own *.py files are carried along by
`saving`, never run. What differs between the families lies in families/.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dfactory.errors import CheckpointError, ConfigError
from dfactory.models import attention, config_keys, experts
from dfactory.models.adapters import (
    adapter_base,
    attach_adapters,
    check_adapters,
    is_adapters,
    merge_into_base,
    whole_model_dir,
)
from dfactory.models.config_keys import MOST_ADDED_TOKENS, MOST_TOKENIZER_BYTES, read_object
from dfactory.models.families.base import FAMILIES, Family, Noise, SpecialTokens
from dfactory.models.headers import Shapes, check_counts, check_shapes, meta_model, read_shapes
from dfactory.models.hub import resolve
from dfactory.models.mask_token import MaskToken, append_rows
from dfactory.models.policy import Policy
from dfactory.models.saving import GENERATION_CONFIG, LOGIT_SHIFT
from dfactory.ranges import TokenRanges
from dfactory.types import NO_MASK

attention.register()
experts.register()
transformers_logging.disable_progress_bar()


def read_config(model_dir: Path, new_rows: int = 0) -> PreTrainedConfig:
    """config.json, of adapters that of their base -> a transformers config of a known family, its vocabulary larger by
    `new_rows`. Raises CheckpointError or ConfigError."""
    model_dir = whole_model_dir(model_dir)
    file, keys = _read_keys(model_dir)
    family, variant = FAMILIES.claiming(file, keys)
    config_keys.check_keys(file, keys, family.keys)
    try:
        config = variant.config_class.from_dict(keys)
    except (ValueError, TypeError) as problem:
        raise CheckpointError(f"{file} is refused by transformers: {problem}") from problem
    if new_rows:
        config.vocab_size += new_rows
    return config


def read_family(model_dir: Path) -> Family:
    """Whose checkpoint a directory holds. Raises as `read_config`."""
    return FAMILIES.claiming(*_read_keys(whole_model_dir(model_dir)))[0]


def _read_keys(model_dir: Path) -> tuple[Path, dict[str, Any]]:
    file = model_dir / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{model_dir} holds no config.json: it is not a model directory")
    return file, read_object(file)


def read_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase | None:
    """The directory's tokenizer, or None where it has none (then records come tokenised)."""
    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    _check_tokenizer(model_dir)
    return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)


def _check_tokenizer(model_dir: Path) -> None:
    """Raise CheckpointError for files that would keep the tokenizers library busy for minutes: it has no bounds itself."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = model_dir / name
        if not file.is_file():
            continue
        stated = read_object(file, MOST_TOKENIZER_BYTES)
        for key in ("added_tokens", "added_tokens_decoder"):
            if len(stated.get(key) or ()) > MOST_ADDED_TOKENS:
                raise CheckpointError(
                    f"{key} in {file} has {len(stated[key]):,} entries: at most {MOST_ADDED_TOKENS:,} are read; put the "
                    "tokens into the vocabulary instead"
                )


def refuse_foreign_tokenizer(model_dir: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise ConfigError for a tokenizer that is another model's: its text has ids beyond the model's vocabulary, it names
    another mask than the model's family, or the ids that the family reserves are text in it."""
    if tokenizer is None:
        return
    file, keys = _read_keys(whole_model_dir(model_dir))
    family, size = FAMILIES.claiming(file, keys)[0], read_config(model_dir).vocab_size
    foreign, remedy = f"the tokenizer in {model_dir} is another model's", "put the model's own tokenizer there"
    # Some models leave added tokens, such as those of images, without an embedding.
    last = max(set(tokenizer.get_vocab().values()).difference(tokenizer.added_tokens_decoder), default=0)
    if last >= size:
        raise ConfigError(
            f"{foreign}, or the embeddings were not resized for it: its ids go up to {last}, and {file} states a "
            f"vocabulary of {size}; {remedy}"
        )
    known = family.special_tokens(keys)
    if None not in (known.mask, tokenizer.mask_token_id) and known.mask != tokenizer.mask_token_id:
        raise ConfigError(
            f"{foreign}: its mask {tokenizer.mask_token!r} is {tokenizer.mask_token_id}, and that of the family "
            f"{family.name} {known.mask}; {remedy}"
        )
    for name, index in known._asdict().items():
        if index is not None and _is_text(tokenizer, index):
            token = tokenizer.convert_ids_to_tokens(index)
            raise ConfigError(
                f"{foreign}: {index}, the {name} of the family {family.name}, is the text {token!r} in it; {remedy}"
            )


def _is_text(tokenizer: PreTrainedTokenizerBase, index: int) -> bool:
    """Whether an id has a token that is neither special nor written like one."""
    token = tokenizer.convert_ids_to_tokens(index)
    special = index in tokenizer.added_tokens_decoder or index in tokenizer.all_special_ids
    return token is not None and not special and not token.startswith(("<", "[", "|"))


def trained_block_size(model_dir: Path) -> int | None:
    """The block size that a checkpoint of ours was trained with (see `saving`), or that its config.json states, or its
    family's; None: whole documents."""
    file, keys = _read_keys(whole_model_dir(model_dir))
    family, recorded = FAMILIES.claiming(file, keys)[0], _recorded(model_dir)
    if family.sees_whole_document is None and "block_size" in recorded:
        return recorded["block_size"]
    stated = keys.get(family.block_size_key) if family.block_size_key else None
    return recorded.get("block_size") or (stated if type(stated) is int and stated > 0 else family.block_size)


def is_unconverted(model_dir: Path) -> bool:
    """Whether a checkpoint is autoregressive: of such a family, and of no run of ours, which records its block size."""
    return read_family(model_dir).autoregressive and "block_size" not in _recorded(model_dir)


def full_attention(model_dir: Path, stated: bool | None = None) -> bool:
    """Whether a model sees whole documents: as its family does, or where the block size chooses, what was `stated`, else as
    it was trained. Raises ConfigError for a statement that its family contradicts."""
    family = read_family(model_dir)
    known = family.sees_whole_document
    if known is None:
        return trained_block_size(model_dir) is None if stated is None else stated
    if stated not in (None, known):
        raise ConfigError(
            f"decode.full_attention {str(stated).lower()}: a model of the family {family.name} is always "
            f"{family.attention}; leave the key out"
        )
    return known


def known_mask_id(model_dir: Path, stated: int | None) -> int | None:
    """The mask_token_id that was `stated`, or else the one that the recipe of a checkpoint of ours stated, or the family's
    own; None where that is left to the tokenizer, NO_MASK where the family has none. Raises ConfigError for another than the
    family's own."""
    family = read_family(model_dir)
    if stated is not None and stated < 0:  # NO_MASK is none that a user states
        raise ConfigError(f"mask_token_id {stated} is no token of the model: it must be 0 or more")
    if family.noise is Noise.UNIFORM:
        if stated is not None:
            raise ConfigError(
                f"mask_token_id {stated}: the model family {family.name} has uniform noise and no mask; leave the key out"
            )
        return NO_MASK
    known = _special_tokens(model_dir).mask
    if stated is None:
        recorded = _recorded(model_dir).get("mask_token_id")
        return known if recorded is None else recorded
    if known is not None and stated != known:
        raise ConfigError(
            f"mask_token_id {stated}: the mask of the {read_family(model_dir).name} model in {model_dir} is {known}; "
            "leave the key out"
        )
    return stated


def known_eos_id(model_dir: Path, stated: int | None, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The eos_token_id that was `stated`, or else the family's own where the tokenizer names none."""
    named = getattr(tokenizer, "eos_token_id", None)
    return stated if stated is not None or named is not None else _special_tokens(model_dir).eos


def known_stop_ids(model_dir: Path, eos: int, size: int) -> tuple[int, ...]:
    """The further ids that end a response: those beside `eos` that generation_config.json lists as its eos_token_id, as
    far as they are in the vocabulary."""
    listed = _recorded(model_dir).get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < size and i != eos))


def stated_ids(model_dir: Path) -> set[int]:
    """Every id that config.json or generation_config.json gives a meaning to, such as bos_token_id and pad_token_id."""
    _, keys = _read_keys(whole_model_dir(model_dir))
    stated = (v for file in (keys, _recorded(model_dir)) for name, v in file.items() if name.endswith("_token_id"))
    flat = (one for value in stated for one in (value if isinstance(value, list) else [value]))
    return {one for one in flat if type(one) is int}


def known_ranges(model_dir: Path, stated: Mapping[str, Any] | None = None) -> TokenRanges:
    """The token ranges that were `stated`, or else those of a checkpoint of ours, or the family's own. Raises ConfigError
    for what is no range."""
    if stated:
        return TokenRanges.of(stated, "the recipe")
    recorded = _recorded(model_dir).get("token_ranges")
    return TokenRanges.of(read_family(model_dir).token_ranges if recorded is None else recorded, f"{model_dir}")


def known_shift(model_dir: Path, stated: int | None = None) -> int:
    """The logit_shift that was `stated`, or else that of a checkpoint of ours, or the family's own. Raises ConfigError for
    another than the family's own, unless its models are autoregressive: they can be converted either way."""
    family = read_family(model_dir)
    if stated is None:
        return _recorded(model_dir).get(LOGIT_SHIFT, family.logit_shift)
    if stated != family.logit_shift and not family.autoregressive:
        raise ConfigError(
            f"logit_shift {stated}: that of the family {family.name}, whose models are diffusion models already, is "
            f"{family.logit_shift}; leave the key out"
        )
    return stated


def _special_tokens(model_dir: Path) -> SpecialTokens:
    file, keys = _read_keys(whole_model_dir(model_dir))
    return FAMILIES.claiming(file, keys)[0].special_tokens(keys)


def _recorded(model_dir: Path) -> dict[str, Any]:
    file = model_dir / GENERATION_CONFIG
    return read_object(file) if file.is_file() else {}


def load_policy(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    init_weights: str = "pretrained",
    seed: int = 0,
    attn_implementation: str = "auto",
    merged: bool = False,
    token_ranges: Mapping[str, Any] | None = None,
    logit_shift: int | None = None,
    mask: MaskToken | None = None,
) -> Policy:
    """Read a Policy, in evaluation mode: from a local directory, or a model of the hub at `revision`. A directory with LoRA
    adapters is read on top of its base model, and with `merged` they become part of its weights.

    `dtype` auto is the precision that config.json states, or else bfloat16.
    `token_ranges` and `logit_shift` are those that the recipe states; None or empty: as the directory or the family says.
    `mask` is the mask token that a model without one is given: its row is appended where it needs one, and it is saved with
    the model.
    `init_weights="random"` draws the weights from `seed` by the directory's config.json. Raises CheckpointError that
    names every tensor that is missing, unexpected or of another shape.
    """
    model_dir = resolve(name_or_path, revision, weights=init_weights == "pretrained")
    if is_adapters(model_dir):
        base = adapter_base(model_dir)
        check_adapters(model_dir)
        policy = load_policy(base, dtype=dtype, attn_implementation=attn_implementation, merged=True, mask=mask)
        policy.ranges = known_ranges(model_dir, token_ranges)
        policy.logit_shift = known_shift(model_dir, logit_shift)
        attach_adapters(policy, model_dir)
        if merged:
            merge_into_base(policy)
            policy.source_dir = model_dir
        return policy.to(device)
    config, new_rows = read_config(model_dir), mask.new_rows if mask is not None else 0
    if dtype == "auto":
        dtype = config.dtype or torch.bfloat16
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = _draw(config, dtype, seed) if init_weights == "random" else _read(model_dir, config, dtype)
    if new_rows:
        append_rows(model, new_rows)
    policy = Policy(model.eval(), attn_implementation, source_dir=model_dir).to(device)
    policy.ranges, policy.logit_shift = known_ranges(model_dir, token_ranges), known_shift(model_dir, logit_shift)
    policy.mask = mask
    return policy


def _options(dtype: torch.dtype) -> dict:
    return {"dtype": dtype, "attn_implementation": attention.ATTENTION, "experts_implementation": experts.EXPERTS}


def _draw(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES.variant_of(config).model_class._from_config(config, **_options(dtype))


def _read(model_dir: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    shapes = check_tensors(model_dir, config)
    try:
        model, loading = FAMILIES.variant_of(config).model_class.from_pretrained(
            model_dir,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            **_options(dtype),
        )
    except OSError as problem:
        raise CheckpointError(f"{model_dir}: {problem}") from problem
    # The headers fitted, so a difference now means that a family's name map and transformers disagree.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    left = (set(loading["missing_keys"]) - tied) | set(loading["unexpected_keys"]) | set(loading["mismatched_keys"])
    if left or loading["error_msgs"]:
        raise CheckpointError(f"{model_dir}: not read: {', '.join(sorted(map(str, left)))} {loading['error_msgs']}")
    _save_as_read(model, shapes)  # under ZeRO-3 transformers would remember both expert layouts
    return model


def check_tensors(model_dir: Path, config: PreTrainedConfig) -> Shapes:
    """Compare the weight files' headers with what config.json asks for; no weight is read. Raises CheckpointError."""
    model_dir = whole_model_dir(model_dir)
    shapes = read_shapes(model_dir)
    check_counts(model_dir, shapes, config.num_hidden_layers, getattr(config, "num_local_experts", 0))
    model = meta_model(config)
    _save_as_read(model, shapes)
    check_shapes(model_dir, shapes, model)
    return shapes


def _save_as_read(model: PreTrainedModel, shapes: Shapes) -> None:
    save_as_read = FAMILIES.of(model.config).save_as_read
    if save_as_read is not None:
        save_as_read(model, shapes)
