"""A model's tokenizer, special ids and chat encoder, which belong together: whoever turns text to ids reads all three."""

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dfactory.data.chat import ChatEncoder, SpecialIds, id_in, mask_warning, special_ids
from dfactory.data.mask_choice import choose_mask
from dfactory.data.named_templates import read_chat_template
from dfactory.decoding import DecodeRules
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import ConfigError
from dfactory.models.hub import resolve
from dfactory.models.mask_token import MaskToken
from dfactory.models.registry import (
    full_attention,
    known_eos_id,
    known_mask_id,
    known_ranges,
    known_stop_ids,
    read_config,
    read_family,
    read_tokenizer,
    refuse_foreign_tokenizer,
)
from dfactory.ranges import NO_RANGES, TokenRanges
from dfactory.recipe import Recipe
from dfactory.types import Answer, Rollout

INCOMPLETE = "\ufffd"  # how a tokenizer decodes the bytes of an incomplete character


class Vocabulary(NamedTuple):
    """`tokenizer` (transformers') and `encoder` are None for a model directory without a tokenizer."""

    size: int
    special: SpecialIds
    tokenizer: Any
    encoder: ChatEncoder | None
    sees_whole_document: bool = False  # of the model, as it is used: answers are decoded on a canvas
    ranges: TokenRanges = NO_RANGES  # ids of other modalities
    stop_ids: tuple[int, ...] = ()  # that end a response beside EOS, where the keys say nothing else
    chosen_mask: MaskToken | None = None  # by the recipe's mask_token; None: without that key

    @property
    def new_mask(self) -> MaskToken | None:
        """The mask that the model is given because its checkpoint knows none."""
        return self.chosen_mask if self.chosen_mask is not None and self.chosen_mask.is_new else None

    @property
    def mask_note(self) -> str:
        """What a run says of the choice; empty without one."""
        return "" if self.chosen_mask is None else f"mask token: {self.chosen_mask}"

    @property
    def new_rows(self) -> int:
        """Rows that embedding and head get beyond those of the checkpoint; `size` counts them."""
        return 0 if self.chosen_mask is None else self.chosen_mask.new_rows

    @property
    def warnings(self) -> list[str]:
        """What is likely to be a mistake about the special ids."""
        warning = mask_warning(self.tokenizer, self.special.mask)
        return [warning] if warning else []

    def text(self, output_ids: list[int]) -> str | None:
        """A response as people read it: up to what ends it, special tokens left out. None without a tokenizer."""
        if self.tokenizer is None:
            return None
        end = -1 if output_ids and output_ids[-1] in (self.special.eos, *self.stop_ids) else None
        return self.ranges.written(output_ids[:end], self._plain_text)

    def _plain_text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def beginning(self, output_ids: list[int]) -> str | None:
        """The text of a response that goes on: half a character at the end waits for its other bytes."""
        text = self.text(output_ids)
        return text if text is None else text.rstrip(INCOMPLETE)

    def answer(self, rollout: Rollout) -> Answer:
        return Answer(self.text(rollout.output_ids), rollout)

    def rules(self, keys: DecodeKeys) -> DecodeRules:
        """How responses are decoded by these keys. Without a block size a canvas is one block."""
        special = self.special
        return DecodeRules.of(
            keys.in_blocks_of(None) if self.sees_whole_document else keys,
            mask_token_id=special.mask,
            eos_token_id=special.eos,
            special_ids=special.suppressed,
            stop_token_ids=self.stop_ids,
            ranges=self.ranges,
            canvas=self.sees_whole_document,
        )


def find_special(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    mask_token_id: int | None,
    mask_token: str | None,
    mask_is_not: Collection[int],
    eos_token_id: int | None,
    template: str | None,
) -> tuple[SpecialIds, MaskToken | None]:
    """The special ids, and what `mask_token` chose; arguments and errors as in `read_vocabulary`. A chosen token is added to
    the tokenizer, in place."""
    size = read_config(model_dir).vocab_size
    mask, eos = known_mask_id(model_dir, mask_token_id), known_eos_id(model_dir, eos_token_id, tokenizer)
    if mask_token is None:
        return special_ids(tokenizer, mask, eos, size, template), None
    in_use = {*mask_is_not, *(() if eos is None else (eos,))}
    chosen = choose_mask(
        mask_token, model_dir, tokenizer, vocab_size=size, known=mask, in_use=in_use, chat_template=template
    )
    return special_ids(tokenizer, chosen.id, eos, size + chosen.new_rows, template), chosen


def recipe_vocabulary(recipe: Recipe) -> Vocabulary:
    """Raises ConfigError too where the model's family does not take the recipe's block size, and where LoRA would have to
    train a new row."""
    model_dir = resolve(recipe.model_name_or_path, recipe.model_revision, weights=False)
    vocabulary = read_vocabulary(
        recipe.model_name_or_path,
        recipe.model_revision,
        mask_token_id=recipe.mask_token_id,
        mask_token=recipe.mask_token,
        mask_is_not=recipe.decode.stop_token_ids or (),
        eos_token_id=recipe.eos_token_id,
        chat_template_path=recipe.chat_template_path,
        whole=read_family(model_dir).has_full_attention(recipe.block_size),
        token_ranges=recipe.token_ranges,
    )
    if recipe.use_peft and vocabulary.new_rows:
        raise ConfigError(
            f"mask_token {recipe.mask_token} adds a row to the embedding, and LoRA adapters hold no embedding: write a "
            f"model with the row first (`dfactory export --model {recipe.model_name_or_path} --mask-token "
            f"{shlex.quote(recipe.mask_token)} --output DIR`) and start from that, or train all weights (use_peft false)"
        )
    return vocabulary


def read_vocabulary(
    model: str | Path,
    revision: str | None = None,
    *,
    mask_token_id: int | None,
    eos_token_id: int | None,
    mask_token: str | None = None,
    mask_is_not: Collection[int] = (),
    chat_template_path: str | None = None,
    whole: bool | None = None,
    token_ranges: Mapping[str, Any] | None = None,
) -> Vocabulary:
    """Of a model directory, or a name that stands for one; no weights are read or downloaded. `whole` says whether the model
    sees whole documents, where its family leaves that open; None: as it was trained. `mask_token` says which token becomes
    the mask of a model that knows none (see data/mask_choice.py), `mask_is_not` which ids do not. Raises ConfigError where a
    special id is neither known nor given."""
    model_dir = resolve(model, revision, weights=False)
    size = read_config(model_dir).vocab_size
    tokenizer = read_tokenizer(model_dir)
    refuse_foreign_tokenizer(model_dir, tokenizer)
    template = read_chat_template(chat_template_path)
    ranges = known_ranges(model_dir, token_ranges)
    special, chosen = find_special(
        model_dir,
        tokenizer,
        mask_token_id=mask_token_id,
        mask_token=mask_token,
        mask_is_not={*mask_is_not, *ranges.ids},
        eos_token_id=eos_token_id,
        template=template,
    )
    size += 0 if chosen is None else chosen.new_rows
    ranges.check(size, {"mask_token_id": special.mask, "eos_token_id": special.eos}, id_in(tokenizer))
    if tokenizer is None:
        encoder = None
    else:
        encoder = ChatEncoder(tokenizer, template, special, chat_template_path, ranges)
    stops = known_stop_ids(model_dir, special.eos, size)
    return Vocabulary(size, special, tokenizer, encoder, full_attention(model_dir, whole), ranges, stops, chosen)
