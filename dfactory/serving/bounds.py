"""Limits on the size of a request. Counts and characters are checked first, because the time of everything after grows
with them: JSON, chat template, tokenizer, stop texts.
"""

import re
from typing import Any

from dfactory.errors import DataError

LARGEST_BODY = 2**20  # bytes
MOST_CONTAINERS = 20_000  # objects and lists in a body: each takes 60 bytes in Python and time in the garbage collector
MOST_ANSWERS, MOST_STOPS, MOST_MESSAGES = 128, 16, 512
STOP_CHARACTERS = 1024
CHARACTERS_A_TOKEN = 32  # of a prompt, on average: no text has more, apart from runs of spaces
FIELD_SIZE = 8192  # of a field that is not a prompt, as `exceeds` counts
MESSAGE_CHARACTERS = 2000  # of an error message

JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
PROMPT_FIELDS = ("prompt", "messages", "tools", "prompt_ids", "template", "stop", "prediction")


def check_containers(raw: bytes) -> None:
    """Raise DataError for a body with more objects and lists than any request needs. Brackets inside text do not count."""
    if _openers(raw) > MOST_CONTAINERS and _openers(JSON_STRING.sub(b'""', raw)) > MOST_CONTAINERS:
        raise DataError(f"the body is too large, more than {MOST_CONTAINERS} objects and lists: send less")


def _openers(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")


def check_fields(body: dict[str, Any]) -> None:
    """Raise DataError for a field that is far larger than its purpose needs."""
    for name, value in body.items():
        if name not in PROMPT_FIELDS and exceeds(value, FIELD_SIZE):
            raise DataError(f"{name[:80]} has more than {FIELD_SIZE} characters and items: send less")


def check_text(value: Any, longest: int, name: str) -> None:
    """Raise DataError for a prompt, or its parts, too long to fit into `longest` tokens."""
    most = longest * CHARACTERS_A_TOKEN
    if exceeds(value, most):
        raise DataError(
            f"{name} has more than {most} characters: the server takes {longest} tokens for prompt and answer, and at most "
            f"{CHARACTERS_A_TOKEN} characters a token on average"
        )


def exceeds(value: Any, limit: int) -> bool:
    """Whether the strings of a JSON value, plus one for each item, exceed `limit` characters. Stops there."""
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
