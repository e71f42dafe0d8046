"""Prompts to answer: the rows that the reader of records knows, without their answer, and whatever columns a reward reads.

A prompt is `prompt_ids`; `prompt` as text or messages; `messages` or `conversations`, whose last answer is taken off; or
`instruction` or `question` with what may stand beside it (columns.py). Files and rows are read as records are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dfactory.config.data import DatasetKeys
from dfactory.data import columns
from dfactory.data.chat import ChatEncoder
from dfactory.data.columns import ASKED, SYSTEM, asked, sharegpt_messages, with_system
from dfactory.data.fields import (
    BadRow,
    Completion,
    Conversation,
    Fault,
    TokenIds,
    check_messages,
    integers,
    show,
    text,
    tools,
)
from dfactory.data.records import read_objects
from dfactory.errors import DataError

Prompt = Conversation | Completion | TokenIds
FORMATS = {  # the column that a prompt is read from, and those beside it
    "prompt_ids": (),
    "messages": (*SYSTEM, "tools"),
    "conversations": (*SYSTEM, "tools"),
    "prompt": (*SYSTEM, "tools"),
    "instruction": ASKED,
    "question": ASKED,
}
UNSAID = ("annotations", "audio", "function_call", "refusal", "tool_calls")  # of a message; left out when empty


class Row(NamedTuple):
    origin: str  # file:line
    fields: dict[str, Any]


def rows_of(source: str | Path | DatasetKeys) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(file:line, row) of a file, or of an entry of `datasets`; a row that is no object is a BadRow."""
    label = source.label if isinstance(source, DatasetKeys) else source
    for number, fields in read_objects(source):
        if not isinstance(fields, (dict, BadRow)):
            fields = BadRow(Fault.JSON, f"the row is {show(fields)}: it must be a JSON object")
        yield f"{label}:{number}", fields


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file. Raises DataError with file:line for the first bad one."""
    rows = []
    for origin, fields in rows_of(path):
        if isinstance(fields, BadRow):
            raise DataError(f"{origin}: {fields}") from fields
        rows.append(Row(origin, fields))
    return rows


def parse_prompt(row: dict[str, Any]) -> Prompt:
    """What has to be answered. Raises BadRow."""
    name = next((name for name in FORMATS if row.get(name) is not None), None)
    if name is None:
        known = ", ".join(FORMATS)
        raise BadRow(Fault.FORMAT, f"no known format of a prompt has the columns {sorted(row)}: give one of {known}")
    if name == "prompt_ids":
        return TokenIds(ids := integers(row[name], name, may_be_empty=True), len(ids))
    prompt = _read(row, name)
    columns.refuse_unread(
        row, (name, *FORMATS[name]), prompt, content=(*SYSTEM, "context")
    )  # a reward may read the others
    return prompt


def _read(row: dict[str, Any], name: str) -> Conversation | Completion:
    if name == "prompt" and not isinstance(row[name], list):
        columns.refuse_beside_text(row)
        return Completion(text(row[name], name), "")
    if name in ("instruction", "question"):
        messages = asked(row, name)
    else:
        messages = (sharegpt_messages if name == "conversations" else check_messages)(row[name], name)
        messages = with_system(row, _unanswered(messages, name))
    return Conversation(messages, tools(row.get("tools")))


def _unanswered(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The messages without the last answer."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise BadRow(Fault.FIELD, f"{name} has no turn to answer")
    return messages


def prompt_of(row: Row) -> str | list[dict[str, Any]]:
    """As TRL hands it to rewards: messages, or text; of ids alone nothing. Raises DataError with file:line."""
    said = {name: value for name, value in row.fields.items() if name != "prompt_ids"}
    if "prompt_ids" in row.fields and said.keys().isdisjoint(FORMATS):
        return ""
    prompt = _of(Row(row.origin, said))
    return prompt.messages if isinstance(prompt, Conversation) else prompt.prompt


def encode_prompt(row: Row, encoder: ChatEncoder | None) -> list[int]:
    """The token ids that the model has to answer. Raises DataError that names file:line."""
    prompt = _of(row)
    if isinstance(prompt, TokenIds):
        return prompt.input_ids
    if encoder is None:
        raise DataError(f"{row.origin}: the model directory has no tokenizer: give prompt_ids")
    try:
        if isinstance(prompt, Completion):
            return encoder.encode_beginning(prompt.prompt)
        return encoder.encode_prompt(prompt.messages, prompt.tools)
    except BadRow as problem:
        raise BadRow(problem.fault, f"{row.origin}: {problem}") from problem


def _of(row: Row) -> Prompt:
    try:
        return parse_prompt(row.fields)
    except BadRow as problem:
        raise BadRow(problem.fault, f"{row.origin}: {problem}") from problem


def messages_of(value: Any) -> list[dict[str, Any]]:
    """A conversation as OpenAI's clients send it: an earlier answer may be empty, `developer` becomes `system`, and empty
    optional fields are dropped. Raises BadRow."""
    turns = [_said(turn) for turn in value] if isinstance(value, list) else value
    messages = check_messages(turns, may_be_empty=True)
    if messages[-1]["role"] == "assistant":
        raise DataError("the last message is the assistant's: a turn is answered, not continued")
    return messages


def _said(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    turn = {name: value for name, value in turn.items() if value or name not in UNSAID}
    return turn | {"role": "system"} if turn.get("role") == "developer" else turn
