"""The mask token that a model is given because its checkpoint knows none: what it is, its row, its entry in the tokenizer.

data/mask_choice.py chooses it. Where the choice is a new row, embedding and head grow by it when the weights are read. Every
checkpoint records the choice in generation_config.json and in the tokenizer's files, so a saved model needs no key.
"""

import enum
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from dfactory.errors import ConfigError
from dfactory.models.config_keys import MOST_TOKENIZER_BYTES, read_object
from dfactory.models.sharded import whole

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"  # older models state their special tokens here too
NEW_LITERAL = "<|mask|>"


class Origin(enum.StrEnum):
    """Where a mask token comes from."""

    OWN = "the model's own"
    RESERVED = "a reserved token, in no template and in no record: one that holds it is refused"
    NAMED = "named by the recipe: a record that holds it is refused"
    UNUSED = "on a row of the embedding that no token had"
    ADDED = "on a new row of embedding and head, the mean of the others"


class MaskToken(NamedTuple):
    """`literal` is None where the tokenizer has no token of this id, or where there is no tokenizer."""

    id: int
    literal: str | None
    origin: Origin
    new_rows: int = 0  # rows that embedding and head get beyond those of the checkpoint; the last one is the mask's

    def __str__(self) -> str:
        name = f"id {self.id}" if self.literal is None else f"{self.literal}, id {self.id}"
        return f"{name}, {self.origin}"

    @property
    def is_new(self) -> bool:
        """Whether a checkpoint has to record it."""
        return self.origin is not Origin.OWN

    @property
    def is_special(self) -> bool:
        """Whether the tokenizer is to call it its mask token."""
        return self.is_new and self.literal is not None


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, literal: str) -> int:
    """Make the literal the tokenizer's mask token, a new one if it has none of that text. Returns its id."""
    tokenizer.add_special_tokens({"mask_token": AddedToken(literal, special=True, normalized=False)})
    return tokenizer.mask_token_id


@torch.no_grad()
def append_rows(model: PreTrainedModel, count: int) -> None:
    """Give embedding and head `count` more rows, each the mean of the rows there were. A tied head stays tied."""
    before = model.get_input_embeddings().num_embeddings
    with torch.random.fork_rng():  # transformers draws the rows first
        model.resize_token_embeddings(before + count, mean_resizing=False)
    ends = {id(end.weight): end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in ends.values():
        _fill_with_mean(weight, before)


def _fill_with_mean(weight: nn.Parameter, before: int) -> None:
    with whole(weight):
        weight[before:] = weight[:before].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def untrained_mask(model: PreTrainedModel, mask_id: int) -> list[str]:
    """A warning where the mask is the padding token: torch gives its embedding no gradient."""
    if model.get_input_embeddings().padding_idx != mask_id:
        return []
    return [
        f"the mask {mask_id} is the pad_token_id of config.json, whose embedding gets no gradient as an input: what stands "
        "at a masked position is not learnt; choose another mask, or set pad_token_id to null there"
    ]


def require_writable(model_dir: Path, literal: str) -> None:
    """Raise ConfigError where `tokenizer_files` could not add a token of this text."""
    if not (model_dir / TOKENIZER).is_file():
        raise ConfigError(
            f"mask_token {literal}: the tokenizer in {model_dir} has no such token, and without a {TOKENIZER} none can be "
            "added; name one that it has, or save it with transformers (AutoTokenizer.from_pretrained, save_pretrained)"
        )


def tokenizer_files(source_dir: Path, mask: MaskToken) -> dict[str, str]:
    """The texts of the tokenizer's files with this mask token, by name: of those that change."""
    config = _read(source_dir / TOKENIZER_CONFIG)
    config["mask_token"] = mask.literal
    files = {TOKENIZER_CONFIG: config}
    if (source_dir / SPECIAL_TOKENS).is_file():
        files[SPECIAL_TOKENS] = _read(source_dir / SPECIAL_TOKENS) | {"mask_token": mask.literal}
    entry = {"content": mask.literal, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = _read(source_dir / TOKENIZER)
    if tokenizer and all(token["content"] != mask.literal for token in tokenizer["added_tokens"]):
        tokenizer["added_tokens"].append({"id": mask.id, **entry, "special": True})
        files[TOKENIZER] = tokenizer
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"][str(mask.id)] = entry | {"special": True}
    return {name: json.dumps(keys, indent=2, ensure_ascii=False) + "\n" for name, keys in files.items()}


def _read(file: Path) -> dict[str, Any]:
    return read_object(file, MOST_TOKENIZER_BYTES) if file.is_file() else {}
