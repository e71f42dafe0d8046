"""Prompts to answer: JSONL rows with `messages`, `prompt` (text) or `prompt_ids`, and whatever columns a reward reads."""

from pathlib import Path
from typing import Any, NamedTuple

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import integers, text, tools
from dfactory.data.records import BadRow, check_messages, parse_line, read_lines
from dfactory.errors import DataError


class Row(NamedTuple):
    origin: str  # file:line
    fields: dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """The objects of a JSONL file. Raises DataError with file:line."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: give a JSONL file of prompts")
    rows = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(read_lines(file), start=1):
            if not line.strip():
                continue
            origin, fields = f"{path}:{number}", parse_line(line)
            if isinstance(fields, BadRow):
                raise DataError(f"{origin} is {fields}") from fields
            if not isinstance(fields, dict):
                raise DataError(f"{origin} is not an object: a line is {{...}} with messages, prompt or prompt_ids")
            rows.append(Row(origin, fields))
    if not rows:
        raise DataError(f"{path} is empty: give at least one prompt")
    return rows


def prompt_messages(row: Row) -> list[dict[str, Any]] | None:
    """The messages to be answered: a training record's last answer is taken off. None for a prompt that is no chat."""
    if "messages" not in row.fields:
        return None
    messages = check_messages(row.fields["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def prompt_of(row: Row) -> str | list[dict[str, Any]]:
    """As TRL hands it to rewards: messages, or text."""
    messages = prompt_messages(row)
    return messages if messages is not None else str(row.fields.get("prompt", ""))


def encode_prompt(row: Row, encoder: ChatEncoder | None) -> list[int]:
    """The token ids that the model has to answer. Raises DataError that names file:line."""
    fields = row.fields
    try:
        if isinstance(fields.get("prompt_ids"), list):
            return integers(fields["prompt_ids"], "prompt_ids", may_be_empty=True)
        if encoder is None:
            raise DataError("the model directory has no tokenizer: give prompt_ids")
        messages = prompt_messages(row)
        if messages is not None:
            return encoder.encode_prompt(messages, tools(fields.get("tools")))
        if isinstance(fields.get("prompt"), str):
            return encoder.encode_text(text(fields["prompt"], "prompt"))
    except (BadRow, DataError) as problem:
        raise DataError(f"{row.origin}: {problem}") from problem
    raise DataError(f"{row.origin} has none of messages, prompt (text), prompt_ids (list of ids)")
