"""When two records are the same: their prompt, or prompt and response, apart from case, white space and Unicode forms; and
when two inputs are, for work that is taken up again.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfactory.data.entries import entry_of
from dfactory.data.fields import Completion, Conversation, Document, Pair, Record, is_trained
from dfactory.data.tables import commit_of
from dfactory.errors import DataError

Parts = Iterable[str | bytes]


def normalise(text: str) -> str:
    """NFKC, case folded, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_key(record: Record) -> int:
    """64 bits. Records with equal prompts must not stand in two parts of a split. Text without a prompt is its own."""
    return _digest(_prompt(record))


def record_key(record: Record) -> int:
    """64 bits of prompt and response, or of prompt, chosen and rejected."""
    sides = record if isinstance(record, Pair) else (record,)
    return _digest([*_prompt(record), *(part for side in sides for part in _response(side))])


def context_key(parts: Iterable[Any]) -> int:
    """64 bits of messages, texts and tools, compared as prompts are."""
    return _digest(part if isinstance(part, str) else json.dumps(part, sort_keys=True) for part in map(_normal, parts))


def _normal(value: Any) -> Any:
    """A value with every text in it normalised."""
    if isinstance(value, str):
        return normalise(value)
    if isinstance(value, dict):
        return {name: _normal(inner) for name, inner in value.items()}
    return [_normal(inner) for inner in value] if isinstance(value, list) else value


def content_of(word: str) -> str:
    """The SHA-256 of a file; of a dataset on the hub its name and commit. Raises DataError for a file that is none."""
    entry = entry_of(word)
    if entry.path is None:
        return f"{word} at {commit_of(entry)}"
    if not Path(entry.path).is_file():
        raise DataError(f"{entry.path} is not a file")
    with open(entry.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(parts: Parts) -> int:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        found.update(len(encoded).to_bytes(8, "big") + encoded)
    return int.from_bytes(found.digest(), "big")


def _prompt(record: Record) -> list[str | bytes]:
    document = record.chosen if isinstance(record, Pair) else record
    if isinstance(document, Conversation):
        return _messages(document.messages[: _first_trained(document)])
    if isinstance(document, Completion):
        return [normalise(document.prompt or document.completion)]
    return [_ids(document.input_ids[: document.prompt_length] or document.input_ids)]


def _response(document: Document) -> list[str | bytes]:
    if isinstance(document, Conversation):
        return _messages(document.messages[_first_trained(document) :])
    if isinstance(document, Completion):
        return [normalise(document.completion)]
    return [_ids(document.input_ids[document.prompt_length :])]


def _first_trained(conversation: Conversation) -> int:
    trained = range(conversation.trained_from, len(conversation.messages))
    return next(index for index in trained if is_trained(conversation.messages[index]))


def _messages(messages: list[dict]) -> list[str]:
    """Roles and texts; calls of tools as JSON."""
    parts = []
    for message in messages:
        calls = json.dumps(message["tool_calls"], sort_keys=True) if message.get("tool_calls") else ""
        parts += [message["role"], normalise(message["content"]), calls]
    return parts


def _ids(ids: list[int]) -> bytes:
    return b"".join(index.to_bytes(4, "big") for index in ids)
