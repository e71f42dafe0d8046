"""How much a request may hold. Counts and characters are checked first, because what follows takes a time that grows with
them: JSON, chat template, tokenizer, stop texts.
"""

import re
from typing import Any

from dfactory.errors import DataError

LARGEST_BODY = 2**20  # bytes
MOST_CONTAINERS = 20_000  # objects and lists of a body: Python's take 60 bytes and the garbage collector's time each
MOST_ANSWERS, MOST_STOPS, MOST_MESSAGES = 128, 16, 512
STOP_CHARACTERS = 1024
CHARACTERS_A_TOKEN = 32  # of a prompt, on average: no text has more, apart from runs of spaces
FIELD_SIZE = 8192  # of a field that is no prompt, by `exceeds`
MESSAGE_CHARACTERS = 2000  # of a refusal

JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
PROMPT_FIELDS = ("prompt", "messages", "tools", "prompt_ids", "stop", "prediction")


def check_containers(raw: bytes) -> None:
    """Raises DataError for a body of more objects and lists than any request needs. Text may hold as many brackets as it
    likes."""
    if _openers(raw) > MOST_CONTAINERS and _openers(JSON_STRING.sub(b'""', raw)) > MOST_CONTAINERS:
        raise DataError(f"the body is too large, more than {MOST_CONTAINERS} objects and lists: send less")


def _openers(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")


def check_fields(body: dict[str, Any]) -> None:
    """Raises DataError for a field that is far larger than what it is for."""
    for name, value in body.items():
        if name not in PROMPT_FIELDS and exceeds(value, FIELD_SIZE):
            raise DataError(f"{name[:80]} has more than {FIELD_SIZE} characters and items: send less")


def check_text(value: Any, longest: int, name: str) -> None:
    """Raises DataError for a prompt, or the parts of one, that cannot have as few as `longest` tokens."""
    most = longest * CHARACTERS_A_TOKEN
    if exceeds(value, most):
        raise DataError(
            f"{name} has more than {most} characters: the server takes {longest} tokens with the answer, of "
            f"{CHARACTERS_A_TOKEN} characters at most on average"
        )


def exceeds(value: Any, limit: int) -> bool:
    """Whether the strings of a JSON value, with one for each item, have more than `limit` characters. Looks no further."""
    size, left = 0, [value]
    while left and size <= limit:
        item = left.pop()
        size += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict | list):
            size += len(item)
            if size <= limit:
                left += [*item, *item.values()] if isinstance(item, dict) else item
    return size > limit
