"""Messages and text -> token ids, with the response tokens marked; and the one place where special ids are found.

The template is rendered as transformers does it. The rendered text is then cut at the special tokens that the *template*
wrote and at the edges of the assistant turns, and every piece between is encoded as plain text. Hence a special token that a
user's text spells stays text (a private-use character replaces its literal while the template runs), the mask id can
only come from noise, and the prompt of a training example has exactly the ids that the decoder is given.

    <role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role>yo<|role_end|><|endoftext|>
    template's tokens and text, not trained               | trained: the answer, its end of turn, EOS

Where the assistant turns are is found in templates.py.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dfactory.data.records import BadRow, Completion, Conversation, Fault, TokenIds
from dfactory.data.templates import PROBE_TURN, Template
from dfactory.errors import ConfigError
from dfactory.ranges import NO_RANGES, TokenRanges
from dfactory.types import NO_MASK

MASK_LITERALS = ("<|mask|>", "[MASK]", "<|MASK|>", "<|mdm_mask|>", "<mask>")
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # stand-ins for special-token literals while the template runs

Tokens = tuple[np.ndarray, np.ndarray]  # input_ids_T int32, trainable_T bool


class SpecialIds(NamedTuple):
    """The ids that are not text."""

    mask: int  # NO_MASK: the model has none
    eos: int
    suppressed: tuple[int, ...]  # never decoded; ascending, with mask, without eos
    produced: tuple[int, ...]  # special, but responses are trained to hold them: the end of a turn; without eos

    def text_ids(self, vocab_size: int) -> np.ndarray:
        """int32, ascending: the ids of text, none of them special. Random replacements are drawn from these."""
        return np.setdiff1d(
            np.arange(vocab_size, dtype=np.int32), [self.mask, self.eos, *self.suppressed, *self.produced]
        )


def special_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    chat_template: str | None = None,
) -> SpecialIds:
    """Find mask, EOS and the ids that a response must not hold; `mask_token_id` and `eos_token_id` override.

    Suppressed are the mask, the special tokens, and ids that name no token. EOS stays, and so does what the chat template
    writes inside an assistant turn (its end-of-turn token): the model is trained to produce that.
    Raises ConfigError naming mask_token_id or eos_token_id when one is not to be had or makes no sense.
    """
    mask = mask_token_id if mask_token_id is not None else find_mask(tokenizer)
    eos = eos_token_id if eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
    for key, value in (("mask_token_id", mask), ("eos_token_id", eos)):
        if value is None:
            source = "there is no tokenizer" if tokenizer is None else "the tokenizer names none"
            hint = ""
            if key == "mask_token_id":
                hint = f"{_unused_id(tokenizer, vocab_size)}, or let a recipe choose a token: mask_token auto"
            raise ConfigError(f"{key} is null and {source}: set {key}{hint}")
        if value == NO_MASK and key == "mask_token_id":
            continue
        if value < 0 or (vocab_size is not None and value >= vocab_size):
            bound = "0 or more" if vocab_size is None else f"below the model's vocabulary size {vocab_size}"
            raise ConfigError(f"{key} {value} is no token of the model: it must be {bound}")
    if mask == eos:
        raise ConfigError(
            f"mask_token_id {mask} equals eos_token_id {eos}: the model could not tell noise from the end"
        )
    if tokenizer is None:
        return SpecialIds(mask, eos, () if mask == NO_MASK else (mask,), ())
    size = len(tokenizer) if vocab_size is None else vocab_size
    unnamed = set(range(size)).difference(tokenizer.get_vocab().values())
    special = {index for index in special_literals(tokenizer).values() if index < size}
    produced = _end_of_turn_ids(tokenizer, chat_template)
    suppressed = ((special | unnamed) - produced - {eos} | {mask}) - {NO_MASK}
    return SpecialIds(mask, eos, tuple(sorted(suppressed)), tuple(sorted(produced - {eos})))


def mask_warning(tokenizer: PreTrainedTokenizerBase | None, mask: int) -> str | None:
    """What to say of a mask that text holds as well; None if it is special, added, or names no token."""
    literal = tokenizer.convert_ids_to_tokens(mask) if tokenizer is not None and 0 <= mask < len(tokenizer) else None
    if literal is None or mask in tokenizer.added_tokens_decoder or mask in tokenizer.all_special_ids:
        return None
    shown = tokenizer.convert_tokens_to_string([literal])
    return (
        f"mask_token_id {mask} is the ordinary token {shown!r}: records that hold it are refused, and the model can never "
        "write it; take a special token, or an id that no token has"
    )


def special_literals(tokenizer: PreTrainedTokenizerBase, also: Iterable[int] = ()) -> dict[str, int]:
    """Every token that text must not turn into, literal -> id: special ones, what the tokenizer declares as control
    tokens of its chat template, and the ids of `also`."""
    added = tokenizer.added_tokens_decoder
    control = set(tokenizer.chat_control_tokens or ()) | set(tokenizer.all_special_tokens)
    literals = {token.content: index for index, token in added.items() if token.special or token.content in control}
    literals |= {tokenizer.convert_ids_to_tokens(index): index for index in tokenizer.all_special_ids}
    literals |= {added[index].content: index for index in also if index in added}
    return literals


def find_mask(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The mask that a tokenizer names, by its role or by its text."""
    if tokenizer is None:
        return None
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    literals = special_literals(tokenizer)
    return next((literals[name] for name in MASK_LITERALS if name in literals), None)


def id_in(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[str], int | None]:
    """What gives the id of a whole token by its literal, None where there is none."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    return vocabulary.get


def _unused_id(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None) -> str:
    """What to take for a mask where an autoregressive model has none, as the end of a sentence."""
    if tokenizer is None or vocab_size is None:
        return ""
    named = set(tokenizer.get_vocab().values())
    free = [index for index in range(vocab_size) if index not in named]
    if not free:
        return " to the id of a token that no text of yours holds: every id of the vocabulary has a token"
    return f" to an id that no text can hold, such as {free[0]} ({len(free)} ids of the vocabulary have no token)"


def _end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> set[int]:
    """Special ids inside an assistant turn, found by encoding a small conversation."""
    if chat_template is None and not tokenizer.chat_template:
        return set()
    try:
        input_ids_T, trainable_T = ChatEncoder(tokenizer, chat_template).encode_messages(PROBE_TURN)
    except BadRow:  # this template wants other conversations, or cannot tell where answers are: records will say so
        return set()
    return set(input_ids_T[trainable_T].tolist()) & set(special_literals(tokenizer).values())


class _Piece(NamedTuple):
    """A stretch of a document: plain text, or one special token."""

    text: str
    token_id: int | None
    trainable: bool


class ChatEncoder:
    """Turns records into token ids with one tokenizer and one chat template.

    `chat_template` (Jinja text) replaces the tokenizer's own; `template_origin` is what messages call it. `special` names
    ids that text must not turn into although the tokenizer does not call them special (a mask token given by the recipe).
    `ranges` are those whose tokens any text may hold, written `<|name_17|>`.
    Raises ConfigError for a tokenizer whose ids of a text depend on the text before it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        special: SpecialIds | None = None,
        template_origin: str | None = None,
        ranges: TokenRanges = NO_RANGES,
    ):
        self.tokenizer, self._ranges = tokenizer, ranges
        self._own_template = chat_template
        self._variables: dict[str, Any] = {}
        self._origin = template_origin or (
            "of the recipe" if chat_template is not None else f"of {tokenizer.name_or_path or 'the tokenizer'}"
        )
        self._templates: dict[str, Template] = {}
        self._literals = special_literals(tokenizer, also=special[:2] if special else ())
        self._literal_pattern = _any_of(re.escape(literal) for literal in self._longest_first())
        self._special_pattern = _any_of(self._with_whitespace(literal) for literal in self._longest_first())
        self._beginning = _beginning_of(tokenizer)
        self._never_from_text = frozenset(self._literals.values()) - {tokenizer.unk_token_id}
        if self._encode_plain(["\n"])[0] + self._encode_plain(["a"])[0] != self._encode_plain(["\na"])[0]:
            raise ConfigError(
                "the tokenizer puts a space before the first word of every text, but a conversation is encoded piece "
                "by piece: use a byte-level tokenizer"
            )

    @property
    def template(self) -> str:
        """The text of the chat template. Raises ConfigError where there is none."""
        return self._template(None).text

    def with_variables(self, variables: dict[str, Any]) -> "ChatEncoder":
        """An encoder that gives the template these variables besides (`chat_template_kwargs`)."""
        changed = copy.copy(self)
        changed._variables = variables
        return changed

    # --- documents --------------------------------------------------------------------------------------------------

    def encode_messages(self, messages: list[dict], tools: list[dict] | None = None, trained_from: int = 0) -> Tokens:
        """A conversation -> (input_ids_T int32, trainable_T bool); every assistant turn from message `trained_from` on
        is trainable, its end-of-turn token included. No EOS is added. Raises BadRow where the template refuses."""
        return self._encode_pieces([self._conversation_pieces(Conversation(messages, tools, trained_from))])[0]

    def encode_prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """A conversation -> the ids after which the model has to answer. Raises BadRow where the template refuses."""
        pieces = self._conversation_pieces(Conversation(messages, tools), add_generation_prompt=True)
        return self._encode_pieces([pieces])[0][0].tolist()

    def encode_text(self, text: str) -> list[int]:
        """Plain text -> ids, none of them special. It may continue an earlier text."""
        return self._encode_pieces([[_Piece(text, None, False)]])[0][0].tolist()

    def encode_beginning(self, text: str) -> list[int]:
        """Plain text at the beginning of a document -> ids, after what the tokenizer puts in front of every text."""
        return [*self._beginning, *self.encode_text(text)]

    def encode_records(self, records: Sequence[Conversation | Completion | TokenIds]) -> list[Tokens | BadRow]:
        """Encode many records in one tokenizer call (it runs on all cores); an unusable one gives a BadRow in its place."""
        plans = [self._plan(record) for record in records]
        encoded = iter(self._encode_pieces([plan for plan in plans if isinstance(plan, list)], keep_bad=True))
        return [next(encoded) if isinstance(plan, list) else plan for plan in plans]

    def _plan(self, record: Conversation | Completion | TokenIds) -> list[_Piece] | Tokens | BadRow:
        if isinstance(record, TokenIds):
            return token_ids(record)
        if isinstance(record, Completion):
            begin = [_Piece("", index, False) for index in self._beginning]
            return [*begin, _Piece(record.prompt, None, False), _Piece(record.completion, None, True)]
        try:
            return self._conversation_pieces(record)
        except BadRow as bad:
            return bad

    # --- messages -> rendered text -> pieces ------------------------------------------------------------------------

    def _conversation_pieces(self, conversation: Conversation, add_generation_prompt: bool = False) -> list[_Piece]:
        messages, tools, trained_from, _ = conversation
        (messages, tools), stand_ins = self._hide_literals((messages, tools))
        template, hidden = self._template(tools), Conversation(messages, tools, trained_from)
        if add_generation_prompt:
            return self._cut(template.prompt(hidden, self._variables), [], stand_ins, drop_tail=False)
        return self._cut(*template.document(hidden), stand_ins, drop_tail=True)

    def _template(self, tools: list[dict] | None) -> Template:
        text = self._own_template
        if text is None and not self.tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template, but a record has messages: set chat_template_path")
        if text is None:
            try:
                text = self.tokenizer.get_chat_template(tools=tools)
            except ValueError as problem:  # named ones, and none is the default
                raise ConfigError(f"the chat template {self._origin}: {problem}; set chat_template_path") from problem
        if text not in self._templates:
            self._templates[text] = Template(text, self.tokenizer, self._origin)
        return self._templates[text]

    def _cut(self, text: str, spans: list[tuple[int, int]], stand_ins: dict[str, str], drop_tail: bool):
        """Cut at special tokens and at the edges of the spans. White space that the template puts after an
        end-of-turn token is not trained, and dropped (`drop_tail`) where the document ends with it."""
        spans = [(start, self._before_trailing_space(text, start, end)) for start, end in spans]
        if drop_tail and spans and not text[spans[-1][1] :].strip():
            text = text[: spans[-1][1]]
        edges = sorted({0, len(text), *(edge for span in spans for edge in span if edge <= len(text))})
        starts = dict(spans)
        pieces, trained_to = [], 0
        for start, end in itertools.pairwise(edges):
            trained_to = max(trained_to, starts.get(start, 0))
            pieces += self._split(text[start:end], stand_ins, trainable=start < trained_to)
        return pieces

    def _before_trailing_space(self, text: str, start: int, end: int) -> int:
        bare = start + len(text[start:end].rstrip())
        after_special = any(text.endswith(literal, start, bare) for literal in self._literals)
        return bare if after_special else end

    def _split(self, text: str, stand_ins: dict[str, str], trainable: bool) -> list[_Piece]:
        pieces, position = [], 0
        for match in self._special_pattern.finditer(text):
            pieces.append(_Piece(_restore(text[position : match.start()], stand_ins), None, trainable))
            literal = match[0] if match[0] in self._literals else self._without_whitespace(match[0])
            pieces.append(_Piece(literal, self._literals[literal], trainable))
            position = match.end()
        pieces.append(_Piece(_restore(text[position:], stand_ins), None, trainable))
        return [piece for piece in pieces if piece.text]

    def _hide_literals(self, value: Any) -> tuple[Any, dict[str, str]]:
        """Replace special-token literals in every string by single characters that occur nowhere in the strings."""
        text = "\0".join(_strings(value))
        found = sorted({match[0] for match in self._literal_pattern.finditer(text)})
        if not found:
            return value, {}
        used = set(text)
        free = [character for code in PRIVATE_USE if (character := chr(code)) not in used]
        if len(free) < len(found):
            raise BadRow(Fault.SPECIAL_TOKEN, "the record uses all private-use characters: remove some of them")
        stand_ins = dict(zip(free, found, strict=False))
        hide = {literal: character for character, literal in stand_ins.items()}
        return _map_strings(value, lambda part: self._literal_pattern.sub(lambda m: hide[m[0]], part)), stand_ins

    # --- pieces -> ids ----------------------------------------------------------------------------------------------

    def _encode_pieces(self, documents: list[list[_Piece]], keep_bad: bool = False) -> list[Tokens | BadRow]:
        if self._ranges:
            documents = [self._with_range_tokens(pieces) for pieces in documents]
        texts = [piece.text for pieces in documents for piece in pieces if piece.token_id is None]
        encoded = iter(self._encode_plain(texts) if texts else ())
        results = []
        for pieces in documents:
            ids = [next(encoded) if piece.token_id is None else [piece.token_id] for piece in pieces]
            bad = self._special_from_text(pieces, ids)
            if bad and not keep_bad:
                raise bad
            results.append(bad or _join(ids, [piece.trainable for piece in pieces]))
        return results

    def _with_range_tokens(self, pieces: list[_Piece]) -> list[_Piece]:
        """The pieces with the tokens of ranges cut out of their texts."""
        cut = []
        for piece in pieces:
            for part in self._ranges.split(piece.text) if piece.token_id is None else (piece.token_id,):
                is_token = isinstance(part, int)
                cut.append(_Piece("" if is_token else part, part if is_token else None, piece.trainable))
        return cut

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def _special_from_text(self, pieces: list[_Piece], ids: list[list[int]]) -> BadRow | None:
        """A tokenizer whose ordinary vocabulary spells a special token out of text cannot keep the two apart."""
        for piece, piece_ids in zip(pieces, ids, strict=True):
            wrong = self._never_from_text.intersection(piece_ids) if piece.token_id is None else ()
            if wrong:
                token = self.tokenizer.convert_ids_to_tokens(min(wrong))
                return BadRow(Fault.SPECIAL_TOKEN, f"the tokenizer makes {token} out of plain text: remove it there")
        return None

    def _longest_first(self) -> list[str]:
        return sorted(self._literals, key=len, reverse=True)

    def _with_whitespace(self, literal: str) -> str:
        """A pattern for the token, with the white space that the tokenizer lets it swallow. No groups where none does: with
        them, a search takes a hundred times as long."""
        token = self.tokenizer.added_tokens_decoder.get(self._literals[literal])
        left = r"(?:(?<!\s)\s++)?" if token is not None and token.lstrip else ""  # linear in a run of spaces
        right = r"\s*" if token is not None and token.rstrip else ""
        return f"{left}{re.escape(literal)}{right}"

    def _without_whitespace(self, found: str) -> str:
        return next(literal for literal in self._longest_first() if literal in found)


def _beginning_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special ids that a tokenizer puts in front of a text: BOS for Llama and Gemma, nothing for LLaDA2, LLaDA, Qwen and
    what stems from it (Dream, SDAR, Fast-dLLM). A conversation gets what its template writes."""
    whole = tokenizer("a", return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return list(itertools.takewhile(special.__contains__, whole))


def token_ids(record: TokenIds) -> Tokens:
    """A record that comes tokenised, as (input_ids_T int32, trainable_T bool)."""
    return np.array(record.input_ids, np.int32), np.arange(len(record.input_ids)) >= record.prompt_length


def _join(ids: list[list[int]], trainable: list[bool]) -> Tokens:
    lengths = [len(part) for part in ids]
    return np.array([i for part in ids for i in part], np.int32), np.repeat(np.array(trainable, bool), lengths)


def _restore(text: str, stand_ins: dict[str, str]) -> str:
    for character, literal in stand_ins.items():
        text = text.replace(character, literal)
    return text


def _any_of(patterns: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(patterns) or "(?!)")


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _map_strings(value: Any, change) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(inner, change) for inner in value]
    return value
