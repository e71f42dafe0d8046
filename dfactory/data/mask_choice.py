"""Which token becomes the mask of a model whose checkpoint knows none: the recipe's key `mask_token`.

`auto` takes, in this order:

    1. the model's own mask, where its family, its files or its tokenizer name one
    2. a reserved token of the tokenizer, one whose name says so before one whose name has a meaning
    3. a row of the embedding that no token has
    4. a new row, the mean of the others

The choice depends on the model directory and the recipe's keys, not on the records, so all ranks and a resumed run make the
same one without reading a record twice. Text never turns into a special token (chat.py). A template that writes the token
rules it out here. A tokenised record that holds it is refused with file and line when it is read, while streaming too.
"""

import contextlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dfactory.data.chat import ChatEncoder, find_mask, special_literals
from dfactory.data.fields import BadRow
from dfactory.data.templates import PROBE_TURN
from dfactory.errors import ConfigError
from dfactory.models.mask_token import NEW_LITERAL, MaskToken, Origin, add_to_tokenizer, require_writable
from dfactory.models.registry import stated_ids
from dfactory.types import NO_MASK

AUTO = "auto"
_SAYS_RESERVED = re.compile(r"reserved|unused|empty|extra_?id|placeholder|dummy|spare|control_\d", re.IGNORECASE)
_SAYS_PADDING = re.compile(r"pad", re.IGNORECASE)  # of inputs that a decoder of text does not have, such as images


def choose_mask(
    wanted: str,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    known: int | None,
    in_use: Collection[int],
    chat_template: str | None = None,
) -> MaskToken:
    """`wanted` is AUTO or the text of a token; `known` the mask that the family or the checkpoint states; `in_use` ids that
    mean something else to the recipe. The tokenizer is given the token, in place. Raises ConfigError where the model has
    another mask, and where the token means something else."""
    own = find_mask(tokenizer) if known is None else known
    if own is not None:
        return _own(wanted, model_dir, tokenizer, own)
    if tokenizer is None:
        return _without_tokenizer(wanted, model_dir, vocab_size)
    roles = {*in_use, *_roles(model_dir, tokenizer, chat_template)}
    if wanted != AUTO:
        return _named(wanted, model_dir, tokenizer, vocab_size, roles)
    reserved = min(_reserved(tokenizer, vocab_size, roles), default=None)
    if reserved is not None:
        literal = reserved[-1]
        return MaskToken(add_to_tokenizer(tokenizer, literal), literal, Origin.RESERVED)
    return _new_token(NEW_LITERAL, model_dir, tokenizer, vocab_size)


def _own(wanted: str, model_dir: Path, tokenizer: PreTrainedTokenizerBase | None, own: int) -> MaskToken:
    if own == NO_MASK and wanted != AUTO:
        raise ConfigError(
            f"mask_token {wanted}: the model in {model_dir} has uniform noise and no mask; leave the key out"
        )
    literal = None if tokenizer is None else tokenizer.convert_ids_to_tokens(own)
    if wanted not in (AUTO, literal):
        raise ConfigError(
            f"mask_token {wanted}: the mask of the model in {model_dir} is {own if literal is None else literal}; leave the "
            "key out, or set it to auto"
        )
    return MaskToken(own, literal, Origin.OWN)


def _without_tokenizer(wanted: str, model_dir: Path, vocab_size: int) -> MaskToken:
    """A new row: which of the others records use is not known."""
    if wanted != AUTO:
        raise ConfigError(
            f"mask_token {wanted}: {model_dir} has no tokenizer; set mask_token_id, or mask_token to auto"
        )
    return MaskToken(vocab_size, None, Origin.ADDED, new_rows=1)


def _named(
    wanted: str, model_dir: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, roles: Collection[int]
) -> MaskToken:
    index = tokenizer.get_vocab().get(wanted)
    if index is None:
        return _new_token(wanted, model_dir, tokenizer, vocab_size)
    if index in roles:
        raise ConfigError(
            f"mask_token {wanted} has another meaning: the tokenizer, the chat template or the recipe uses it; name "
            "another, or set mask_token to auto"
        )
    if index >= vocab_size:
        raise ConfigError(
            f"mask_token {wanted}: its id {index} has no row in the embedding of {vocab_size}; name another"
        )
    if index not in tokenizer.added_tokens_decoder:  # a word: to call it special would change how text is cut
        return MaskToken(index, None, Origin.NAMED)
    return MaskToken(add_to_tokenizer(tokenizer, wanted), wanted, Origin.NAMED)


def _new_token(literal: str, model_dir: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> MaskToken:
    """On the row of the id that the tokenizer gives it."""
    require_writable(model_dir, literal)
    taken = set(tokenizer.get_vocab().values())
    index = add_to_tokenizer(tokenizer, literal)
    if index in taken:  # ids with holes: the library counts the tokens to find the next one
        raise ConfigError(
            f"mask_token {literal}: the ids of the tokenizer in {model_dir} have holes, and a new token would get {index}, "
            "which another has; name a token that it has, or set mask_token_id"
        )
    if index < vocab_size:
        return MaskToken(index, literal, Origin.UNUSED)
    return MaskToken(index, literal, Origin.ADDED, new_rows=index + 1 - vocab_size)


def _reserved(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, roles: Collection[int]
) -> Iterable[tuple[int, int, str]]:
    """(rank of its name, id, literal) of the tokens that nothing uses."""
    special = set(special_literals(tokenizer).values())
    for index, token in tokenizer.added_tokens_decoder.items():
        rank = _rank(token.content)
        if index < vocab_size and index not in roles and (index in special or rank == 0):
            yield rank, index, token.content


def _rank(literal: str) -> int:
    if _SAYS_RESERVED.search(literal):
        return 0
    return 1 if _SAYS_PADDING.search(literal) else 2


def _roles(model_dir: Path, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> set[int]:
    """The ids that already mean something: of the tokenizer's roles, of the files, and all that templates write."""
    literals = special_literals(tokenizer)
    named = (getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "sep", "pad", "cls"))
    control = (literals[token] for token in tokenizer.chat_control_tokens or () if token in literals)
    around = tokenizer("a", return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    roles = {index for index in named if index is not None} | stated_ids(model_dir)
    roles |= {*control, *set(literals.values()).intersection(around)}
    templates = _templates(tokenizer, chat_template)
    everything = literals | {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    roles |= {index for literal, index in everything.items() if any(literal in text for text in templates)}
    return roles | _rendered(tokenizer, chat_template)


def _templates(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> list[str]:
    own = tokenizer.chat_template or ()
    texts = own.values() if isinstance(own, Mapping) else [own] if own else []
    return [text for text in (*texts, chat_template) if text]


def _rendered(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> set[int]:
    """The added tokens in a small conversation: a template may put its literals together from parts."""
    if not tokenizer.chat_template and chat_template is None:
        return set()
    encoder, found = ChatEncoder(tokenizer, chat_template), set()
    with contextlib.suppress(BadRow):  # this template wants other conversations
        found |= set(encoder.encode_prompt(PROBE_TURN[:1]))
    with contextlib.suppress(BadRow):
        found |= set(encoder.encode_messages(PROBE_TURN)[0].tolist())
    return found.intersection(tokenizer.added_tokens_decoder)
