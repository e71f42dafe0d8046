"""Sections `model`, `weights` and `tokens`: what config.json, the files' headers and the tokenizer tell."""

import dataclasses
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dfactory.commands.checking.page import Page, in_bytes, in_short
from dfactory.data.chat import ChatEncoder, SpecialIds, mask_warning
from dfactory.data.named_templates import read_chat_template
from dfactory.data.records import BadRow
from dfactory.data.rendering import DATE
from dfactory.data.templates import GENERATION_MARKER, PROBE_TURN
from dfactory.models.adapters import unreached_experts, whole_model_dir
from dfactory.models.families.base import FAMILIES
from dfactory.models.headers import weight_files
from dfactory.models.hub import is_downloaded, resolve
from dfactory.models.mask_token import untrained_mask
from dfactory.models.registry import (
    check_tensors,
    known_mask_id,
    known_ranges,
    known_shift,
    meta_model,
    read_config,
    read_tokenizer,
    refuse_foreign_tokenizer,
    trained_block_size,
)
from dfactory.planning.memory import ParameterCounts, count_adapters, count_parameters
from dfactory.ranges import Range
from dfactory.recipe import Recipe
from dfactory.types import NO_MASK
from dfactory.vocabulary import find_special

LITERALS_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """What config.json tells."""

    path: Path
    config: PreTrainedConfig
    counts: ParameterCounts
    trained: int  # parameters: all of them, or the adapters'
    new_rows: int = 0  # that the vocabulary has beyond the checkpoint's; they are counted

    def with_rows(self, new_rows: int) -> "Model":
        """The same with more rows, all of whose parameters are trained."""
        if not new_rows:
            return self
        counts = count_parameters(self.path, new_rows)
        return Model(self.path, read_config(self.path, new_rows), counts, counts.total, new_rows)


def tell_model(page: Page, recipe: Recipe, precision: str | None = None) -> Model:
    """`precision`: why it has the dtype it has, where the recipe leaves that open."""
    path = resolve(recipe.model_name_or_path, recipe.model_revision, weights=False)
    config, counts = read_config(path), count_parameters(path)
    adapters = count_adapters(path, recipe.lora_r, tuple(recipe.lora_target_modules)) if recipe.use_peft else None
    model = Model(path, config, counts, counts.total if adapters is None else adapters)
    page.line("directory", f"{path}, model_type {config.model_type}")
    for finding in FAMILIES.of(config).checked:
        page.line("self-check", finding)
    page.line(
        "parameters",
        f"{in_short(counts.total)}, of which {in_short(counts.active)} active for a token: "
        f"experts {in_short(counts.experts)}, vocabulary {in_short(counts.vocabulary)}, other {in_short(counts.other)}",
    )
    lora = f" by LoRA, r {recipe.lora_r}, on {', '.join(recipe.lora_target_modules)}" if recipe.use_peft else ", all"
    page.line("trained", f"{in_short(model.trained)}{lora}; {recipe.dtype}; {recipe.init_weights} weights")
    if precision is not None:
        page.line("", precision)
    if recipe.use_peft:
        for warning in unreached_experts(meta_model(config), recipe.lora_target_modules):
            page.warn(warning)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and recipe.max_length > limit:
        page.warn(f"max_length {recipe.max_length} is beyond the model's max_position_embeddings {limit}: lower it")
    if FAMILIES.of(config).autoregressive:
        shift = known_shift(path, recipe.logit_shift)
        left = "the hidden state to its left (logit_shift 1)" if shift else "its own hidden state (logit_shift 0)"
        page.line("predicts", f"a token from {left}")
    else:
        known_shift(path, recipe.logit_shift)
    recorded = trained_block_size(path)
    trained = recipe.init_weights == "pretrained" and not FAMILIES.of(config).autoregressive
    if trained and None not in (recorded, recipe.block_size) and recorded != recipe.block_size:
        page.warn(f"block_size {recipe.block_size}, but the model was trained with {recorded}")
    return model


def tell_weights(page: Page, model: Model) -> None:
    if not is_downloaded(whole_model_dir(model.path)):
        page.line("files", "not downloaded yet: the run does it when it starts")
        return
    files = weight_files(whole_model_dir(model.path))
    check_tensors(model.path, model.config)
    size = sum(file.stat().st_size for file in files)
    page.line(
        "files", f"{len(files)} with {in_bytes(size)}; every tensor has the name and shape that config.json asks for"
    )
    for warning in FAMILIES.of(model.config).warnings(model.config):
        page.warn(warning)


def tell_tokens(page: Page, recipe: Recipe, model: Model) -> Model:
    """Returns the model with the rows that its mask needs."""
    tokenizer = read_tokenizer(model.path)
    refuse_foreign_tokenizer(model.path, tokenizer)
    template = read_chat_template(recipe.chat_template_path)
    if tokenizer is None:
        page.line("tokenizer", "none in the directory: records have to come tokenised (input_ids, prompt_lengths)")
    else:
        page.line("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens")
    ranges = known_ranges(model.path, recipe.token_ranges)
    special, chosen = find_special(
        model.path,
        tokenizer,
        mask_token_id=recipe.mask_token_id,
        mask_token=recipe.mask_token,
        mask_is_not={*ranges.ids, *(recipe.decode.stop_token_ids or ())},
        eos_token_id=recipe.eos_token_id,
        template=template,
    )
    recorded = known_mask_id(model.path, None)
    if recorded is not None and special.mask != recorded:
        page.warn(f"mask_token_id {special.mask}, but the model was trained with {recorded}: leave the key out")
    if warning := mask_warning(tokenizer, special.mask):
        page.warn(warning)
    if not recipe.use_peft:
        for warning in untrained_mask(meta_model(model.config), special.mask):
            page.warn(warning)
    if chosen is not None:
        page.line("mask token", f"{chosen}")
    page.line("mask, EOS", f"{_token(tokenizer, special.mask)}, {_token(tokenizer, special.eos)}")
    page.line("never decoded", _suppressed(tokenizer, special))
    for one in ranges:
        page.line(f"range {one.name}", _range(tokenizer, one))
    if tokenizer is not None:
        _template(page, recipe, tokenizer, template, special)
    return model.with_rows(0 if chosen is None else chosen.new_rows)


def _token(tokenizer: PreTrainedTokenizerBase | None, index: int) -> str:
    if index == NO_MASK:
        return "none: noise is uniform"
    literal = None if tokenizer is None else tokenizer.convert_ids_to_tokens(index)
    return f"{index} {literal}" if literal is not None else f"{index}"


def _range(tokenizer: PreTrainedTokenizerBase | None, one: Range) -> str:
    """A token range, and how many of its ids mean something else to the tokenizer."""
    count = one.stop - one.start
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    own = {f"<|{one.name}_{number}|>" for number in range(count)}
    taken = sum(one.start <= index < one.stop and literal not in own for literal, index in vocabulary.items())
    instead = f", {taken} of them in place of the tokenizer's tokens" if taken else ""
    return f"{one.start} to {one.stop - 1}, <|{one.name}_0|> to <|{one.name}_{count - 1}|>{instead}"


def _suppressed(tokenizer: PreTrainedTokenizerBase | None, special: SpecialIds) -> str:
    if tokenizer is None:
        return _token(None, special.mask)
    named = [_token(tokenizer, index) for index in special.suppressed if tokenizer.convert_ids_to_tokens(index)]
    unnamed = len(special.suppressed) - len(named)
    more = [f"{len(named) - LITERALS_SHOWN} more special tokens"] if len(named) > LITERALS_SHOWN else []
    more += [f"{unnamed} ids that name no token"] if unnamed else []
    return ", ".join(named[:LITERALS_SHOWN] + more)


def _template(
    page: Page, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, own: str | None, special: SpecialIds
) -> None:
    text = own if own is not None else tokenizer.chat_template
    if not text:
        page.line("chat template", "none: records with messages or instruction need chat_template_path")
        return
    origin = recipe.chat_template_path or "the tokenizer's own"
    marked = bool(GENERATION_MARKER.search(str(text)))
    page.line("chat template", f"{origin}, {'with' if marked else 'without'} generation markers")
    if "strftime_now" in str(text):
        page.line("its date", f"{DATE:%d %B %Y}, always: a resumed run has to see the same tokens")
    encoder = ChatEncoder(tokenizer, own, special, recipe.chat_template_path)
    try:
        ids_T, trainable_T = encoder.encode_messages(PROBE_TURN)
        several_T = encoder.encode_messages(PROBE_TURN * 2)[1]
    except BadRow as bad:
        page.warn(f"the chat template refuses a conversation of questions and answers: {bad}")
        return
    turns = int(several_T[0]) + int((several_T[1:] & ~several_T[:-1]).sum())
    if turns != 2:
        page.warn(
            f"of two assistant turns the chat template marks {turns}: earlier answers of a conversation are not trained"
        )
    elif not marked:
        page.line(
            "assistant turns",
            "found by rendering each conversation turn by turn, as there are no {% generation %} markers; both of two were",
        )
    _tell_end(page, tokenizer, special, ids_T, trainable_T)


def _tell_end(page: Page, tokenizer: PreTrainedTokenizerBase, special: SpecialIds, ids_T, trainable_T) -> None:
    """How an answer ends, and whether that is learnt."""
    last = int(ids_T[trainable_T][-1])
    if last == special.eos:
        page.line("ends an answer", "with EOS")
        return
    page.line(
        "ends an answer",
        f"with {_token(tokenizer, last)}; EOS is not in the template and is added after the last turn",
    )
    if last not in special.produced:
        page.warn(
            f"the chat template ends an answer with no special token that is trained ({_token(tokenizer, last)} is "
            "the last): turns within a conversation never learn to end; write an end-of-turn token after each"
        )
