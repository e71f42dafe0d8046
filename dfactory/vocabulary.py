"""A model's tokenizer, special ids and chat encoder, which belong together: whoever turns text to ids reads all three."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dfactory.data.chat import ChatEncoder, SpecialIds, id_in, mask_warning, read_chat_template, special_ids
from dfactory.decoding import DecodeRules
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.hub import resolve
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


def recipe_vocabulary(recipe: Recipe) -> Vocabulary:
    """Raises ConfigError too where the model's family does not take the recipe's block size."""
    model_dir = resolve(recipe.model_name_or_path, recipe.model_revision, weights=False)
    return read_vocabulary(
        recipe.model_name_or_path,
        recipe.model_revision,
        mask_token_id=recipe.mask_token_id,
        eos_token_id=recipe.eos_token_id,
        chat_template_path=recipe.chat_template_path,
        whole=read_family(model_dir).has_full_attention(recipe.block_size),
        token_ranges=recipe.token_ranges,
    )


def read_vocabulary(
    model: str,
    revision: str | None = None,
    *,
    mask_token_id: int | None,
    eos_token_id: int | None,
    chat_template_path: str | None = None,
    whole: bool | None = None,
    token_ranges: Mapping[str, Any] | None = None,
) -> Vocabulary:
    """Of a model directory, or a name that stands for one; no weights are read or downloaded. `whole` says whether the model
    sees whole documents, where its family leaves that open; None: as it was trained. Raises ConfigError where a special id
    is neither known nor given."""
    model_dir = resolve(model, revision, weights=False)
    size = read_config(model_dir).vocab_size
    tokenizer = read_tokenizer(model_dir)
    refuse_foreign_tokenizer(model_dir, tokenizer)
    template = read_chat_template(chat_template_path)
    mask, eos = known_mask_id(model_dir, mask_token_id), known_eos_id(model_dir, eos_token_id, tokenizer)
    special = special_ids(tokenizer, mask, eos, size, template)
    ranges = known_ranges(model_dir, token_ranges)
    ranges.check(size, {"mask_token_id": special.mask, "eos_token_id": special.eos}, id_in(tokenizer))
    if tokenizer is None:
        encoder = None
    else:
        encoder = ChatEncoder(tokenizer, template, special, chat_template_path, ranges)
    stops = known_stop_ids(model_dir, special.eos, size)
    return Vocabulary(size, special, tokenizer, encoder, full_attention(model_dir, whole), ranges, stops)
