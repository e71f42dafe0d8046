"""Ranges of token ids for other modalities: image codes, action bins (docs/method.md#ranges).

A model of text learns another modality as tokens: `action: [1600, 1856]` says that the 256 ids from 1600 on are actions,
not text. Each range is a *group* of ids, and what lies in no range is group 0, text. A position holds tokens of one group,
and its distribution is a softmax over that group alone:

    ids      0 .. 1599 | 1600 .. 1855 | 1856 .. 2047        token_ranges: {action: [1600, 1856]}
    group        0     |      1       |      0

In training a position's group is that of the token to predict; in decoding `decode.answer_ranges` states it. As no loss
compares scores of two groups, new ids do not disturb the text's distribution, and a few hundred action bins are not learnt
against the whole vocabulary.

In text a token of a range is written `<|action_17|>`, counted from the start of the range.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dfactory.errors import ConfigError

TEXT = "text"  # how `answer_ranges` calls positions of no range
NAME = re.compile(r"[a-z][a-z0-9_]*")
ITEM = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(?:\*\s*([1-9][0-9]{0,8})\s*)?")


class Range(NamedTuple):
    """The ids from `start` up to but not including `stop`."""

    name: str
    start: int
    stop: int


class TokenRanges(tuple[Range, ...]):
    """The ranges of a model, none by default."""

    @classmethod
    def of(cls, stated: Mapping[str, Any] | None, origin: str) -> "TokenRanges":
        """Of `{name: [start, stop]}`. Raises ConfigError for what is no range, and for ranges that overlap."""
        ranges = cls(_range(name, bounds, origin) for name, bounds in (stated or {}).items())
        ordered = sorted(ranges, key=lambda one: one.start)
        for one, other in itertools.pairwise(ordered):
            if other.start < one.stop:
                raise ConfigError(
                    f"token_ranges.{one.name} {list(one[1:])} and token_ranges.{other.name} {list(other[1:])} overlap in "
                    f"{origin}: an id has one meaning; move one of them"
                )
        return ranges

    @property
    def stated(self) -> dict[str, list[int]]:
        """As a recipe and a checkpoint state them."""
        return {one.name: [one.start, one.stop] for one in self}

    def check(self, vocab_size: int, special: Mapping[str, int], id_of: Callable[[str], int | None]) -> None:
        """Raise ConfigError for a range that leaves the vocabulary, that holds one of the `special` ids (by their recipe
        keys), or whose tokens have other ids in the tokenizer; `id_of` gives the id of a literal there."""
        for one in self:
            shown = f"token_ranges.{one.name} {list(one[1:])}"
            if one.stop > vocab_size:
                raise ConfigError(
                    f"{shown}: the model's vocabulary has {vocab_size} ids; take unused ones, or those of rare tokens"
                )
            for name, index in special.items():
                if one.start <= index < one.stop:
                    raise ConfigError(f"{shown} holds {name} {index}, which is no {one.name}: move the range")
            for index in (one.start, one.stop - 1):
                found = id_of(self.literal(index))
                if found not in (None, index):
                    raise ConfigError(
                        f"{shown}: the tokenizer has {self.literal(index)} as {found}, not {index}; take its ids"
                    )

    # --- groups ---------------------------------------------------------------------------------------------------------

    def group_of(self, ids: torch.Tensor) -> torch.Tensor:
        """int64: 0 for ids of no range, k for those of the k-th range."""
        group = torch.zeros_like(ids)
        for number, one in enumerate(self, start=1):
            group += number * ((ids >= one.start) & (ids < one.stop))
        return group

    def others(self, group_N: torch.Tensor, columns: slice) -> torch.Tensor:
        """bool [N, columns]: which of some neighbouring ids are not in the group of each position."""
        ids = torch.arange(columns.start, columns.stop, device=group_N.device)
        return group_N[:, None] != self.group_of(ids)

    @property
    def ids(self) -> set[int]:
        return {index for one in self for index in range(one.start, one.stop)}

    # --- text -----------------------------------------------------------------------------------------------------------

    def literal(self, index: int) -> str | None:
        """How an id is written, None for one of no range."""
        return next((f"<|{one.name}_{index - one.start}|>" for one in self if one.start <= index < one.stop), None)

    def split(self, text: str) -> list[str | int]:
        """A text as pieces: ids where a token of a range is written, text between them. A number past the end of its range
        is text."""
        pieces, position = [], 0
        for match in self._pattern.finditer(text):
            one = next(one for one in self if one.name == match[1])
            index = one.start + int(match[2])
            if index < one.stop:
                pieces += [text[position : match.start()], index]
                position = match.end()
        return [piece for piece in (*pieces, text[position:]) if piece != ""]

    @property
    def _pattern(self) -> re.Pattern:
        names = "|".join(one.name for one in self)
        return re.compile(rf"<\|({names})_(0|[1-9][0-9]{{0,8}})\|>")

    def written(self, ids: Sequence[int], text_of: Callable[[list[int]], str]) -> str:
        """Ids as text; `text_of` writes a run of ids of no range."""
        parts: list[str] = []
        plain: list[int] = []
        for index in ids:
            literal = self.literal(index)
            if literal is None:
                plain.append(index)
                continue
            parts += [text_of(plain), literal] if plain else [literal]
            plain = []
        return "".join([*parts, text_of(plain)] if plain else parts)

    # --- answers --------------------------------------------------------------------------------------------------------

    def layout(self, stated: str | None, length: int) -> tuple[int, ...]:
        """The group of each of the first `length` tokens of an answer, as `decode.answer_ranges` states them. Raises
        ConfigError for a name that is no range and for what is no layout.

        action*2, text      1 1 0 0 0 ..       what comes after the layout is text
        action              1 1 1 1 1 ..       without a count: to the end
        """
        if stated is None:
            return ()
        groups: list[int] = []
        numbers = {TEXT: 0} | {one.name: number for number, one in enumerate(self, start=1)}
        for item in stated.split(","):
            match = ITEM.fullmatch(item)
            if match is None:
                raise ConfigError(
                    f"decode.answer_ranges {stated}: {item.strip()!r} is no part of a layout; write name*count, such as "
                    "action*4"
                )
            if match[1] not in numbers:
                raise ConfigError(
                    f"decode.answer_ranges {stated}: {match[1]} is no range; token_ranges has {', '.join(numbers)}"
                )
            left = length - len(groups)
            groups += [numbers[match[1]]] * min(left, int(match[2] or left))
        return tuple(groups)


NO_RANGES = TokenRanges()


def _range(name: str, bounds: Any, origin: str) -> Range:
    if name == TEXT or not NAME.fullmatch(str(name)):
        raise ConfigError(
            f"token_ranges.{name} in {origin}: a name has small letters, digits and underscores, and is not {TEXT}"
        )
    is_pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2 and all(type(bound) is int for bound in bounds)
    if not is_pair or not 0 <= bounds[0] < bounds[1]:
        raise ConfigError(
            f"token_ranges.{name} {bounds} in {origin}: it must be [start, stop], the first id and the one after the last"
        )
    return Range(name, *bounds)
