"""Files of records -> checked Conversation, Completion or TokenIds, one a row. A bad row is a value, not a crash.

A format is recognised by its columns. To add one, write a function `row -> Record` that raises BadRow, and enter it
in FORMATS; the first entry whose columns are all there wins. Further columns are ignored; a null counts as absent.
"""

import codecs
import enum
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dfactory.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
PARQUET_BATCH = 1024  # rows that are read together


class Conversation(NamedTuple):
    """Messages for the chat template. Assistant turns before message number `trained_from` are only context."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    trained_from: int = 0


class Completion(NamedTuple):
    """Plain text without a template: the model reads `prompt` and has to write `completion`."""

    prompt: str
    completion: str


class TokenIds(NamedTuple):
    """A record that comes tokenised: everything behind the first `prompt_length` tokens is trainable."""

    input_ids: list[int]
    prompt_length: int


Record = Conversation | Completion | TokenIds


class Fault(enum.StrEnum):
    """Why a row cannot be used; the value is what reports print."""

    ENCODING = "not UTF-8"
    JSON = "not a JSON object"
    FORMAT = "unknown format"
    FIELD = "a field of the wrong type or value"
    EMPTY = "empty answer"
    NO_ANSWER = "no answer to train on"
    TEMPLATE = "refused by the chat template"
    SPECIAL_TOKEN = "special token where text should be"
    VOCABULARY = "token id outside the vocabulary"
    TOO_LONG = "longer than max_length"
    PROMPT_TOO_LONG = "prompt alone fills max_length"


class BadRow(DataError):
    """One row that cannot be used; the message names the field, the value and the rule."""

    def __init__(self, fault: Fault, message: str):
        super().__init__(message)
        self.fault = fault


def read_records(path: str | Path) -> Iterator[tuple[int, Record | BadRow]]:
    """Stream (number, record) of a .jsonl, .jsonl.gz or .parquet file; numbers count lines, or parquet rows, from 1.

    Raises DataError if the file is missing, damaged, of another kind, or holds no row at all.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file: datasets.path must name a .jsonl, .jsonl.gz or .parquet file")
    empty = True
    for number, row in _rows(path):
        empty = False
        yield number, (row if isinstance(row, BadRow) else parse_row(row))
    if empty:
        raise DataError(f"{path} holds no records: leave it out of datasets")


def parse_row(row: Any) -> Record | BadRow:
    """Recognise and check one row; a BadRow is returned, so that the caller decides what it is worth."""
    try:
        return _recognise(row)(row)
    except BadRow as bad:
        return bad


# --- files -> rows ---------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.name.endswith(".parquet"):
        return _parquet_rows(path)
    if path.name.endswith(".jsonl"):
        return _json_rows(path, open)
    if path.name.endswith(".jsonl.gz"):
        return _json_rows(path, gzip.open)
    raise DataError(f"{path}: datasets.path must end in .jsonl, .jsonl.gz or .parquet")


def _json_rows(path: Path, opener: Callable) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, _parse_line(line)
    except (EOFError, zlib.error, OSError) as problem:
        raise DataError(f"{path}:{number}: unreadable behind this line ({problem}): copy the file anew") from problem


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as problem:
        return BadRow(Fault.ENCODING, f"byte {problem.start} of the line is not UTF-8: convert the file to UTF-8")
    except (ValueError, RecursionError) as problem:
        return BadRow(Fault.JSON, f"not valid JSON: {problem}")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, _parquet_row(batch, index)
    except (pyarrow.ArrowException, OSError) as problem:
        raise DataError(f"{path}:{number}: unreadable behind this row ({problem}): copy the file anew") from problem


def _parquet_row(batch, index: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as problem:
        return BadRow(Fault.ENCODING, f"a string of the row is not UTF-8: {problem}")


# --- rows -> records -------------------------------------------------------------------------------------------------


def _read_messages(row: dict) -> Conversation:
    messages = check_messages(row["messages"], "messages")
    _require_answer(messages, "messages")
    return Conversation(messages, _tools(row.get("tools")))


def _read_sharegpt(row: dict) -> Conversation:
    turns = _list_of_objects(row["conversations"], "conversations")
    for index, turn in enumerate(turns):
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise BadRow(Fault.FIELD, f"conversations[{index}].from is {_show(speaker)}: it must be one of {known}")
        _text(turn.get("value"), f"conversations[{index}].value")
    renamed = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    messages = check_messages(renamed, "conversations")
    _require_answer(messages, "conversations")
    return Conversation(messages, _tools(row.get("tools")))


def _read_token_ids(row: dict) -> TokenIds:
    ids, length = row["input_ids"], row["prompt_lengths"]
    if not isinstance(ids, list) or not ids:
        raise BadRow(Fault.FIELD, f"input_ids is {_show(ids)}: it must be a list of token ids")
    for index, value in enumerate(ids):
        if type(value) is not int or not 0 <= value < 2**31:
            raise BadRow(
                Fault.FIELD, f"input_ids[{index}] is {_show(value)}: it must be an integer from 0 to 2**31 - 1"
            )
    if type(length) is not int or not 0 <= length <= len(ids):
        raise BadRow(Fault.FIELD, f"prompt_lengths is {_show(length)}: it must be an integer from 0 to {len(ids)}")
    return TokenIds(ids, length)


def _read_prompt_completion(row: dict) -> Conversation | Completion:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = check_messages(prompt, "prompt")
        answer = check_messages(completion, "completion")
        _require_answer(answer, "completion")
        return Conversation(context + answer, _tools(row.get("tools")), trained_from=len(context))
    return Completion(_text(prompt, "prompt"), _answer(completion, "completion"))


def _read_instruction_response(row: dict) -> Conversation:
    return _single_turn(_text(row["instruction"], "instruction"), _answer(row["response"], "response"))


def _read_alpaca(row: dict) -> Conversation:
    instruction, extra = _text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    return _single_turn(question, _answer(row["output"], "output"))


FORMATS: dict[tuple[str, ...], Callable[[dict], Record]] = {
    ("messages",): _read_messages,
    ("conversations",): _read_sharegpt,
    ("input_ids", "prompt_lengths"): _read_token_ids,
    ("prompt", "completion"): _read_prompt_completion,
    ("instruction", "response"): _read_instruction_response,
    ("instruction", "output"): _read_alpaca,
}


def _recognise(row: Any) -> Callable[[dict], Record]:
    if not isinstance(row, dict):
        raise BadRow(Fault.JSON, f"the row is {_show(row)}: it must be a JSON object")
    present = {name for name, value in row.items() if value is not None}
    for columns, reader in FORMATS.items():
        if present.issuperset(columns):
            return reader
    known = "; ".join(" + ".join(columns) for columns in FORMATS)
    raise BadRow(Fault.FORMAT, f"no known format has the columns {sorted(present)}: give one of {known}")


# --- checks of fields ------------------------------------------------------------------------------------------------


def _single_turn(question: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def check_messages(value: Any, name: str = "messages") -> list[dict[str, Any]]:
    """A list of chat messages as templates want them: null fields dropped, text parts joined. Raises BadRow."""
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(_list_of_objects(value, name))]


def _message(message: dict[str, Any], name: str) -> dict[str, Any]:
    """One message with null fields dropped and text parts joined."""
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise BadRow(Fault.FIELD, f"{name}.role is {_show(role)}: it must be one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None:
        _list_of_objects(calls, f"{name}.tool_calls", may_be_empty=True)
    content = _content(message.get("content", "" if calls else None), f"{name}.content")
    if role == "assistant" and not calls and not content.strip():
        raise BadRow(Fault.EMPTY, f"{name}.content is empty: an assistant turn needs text or tool_calls")
    message["content"] = content
    _refuse_surrogates(message, name)
    return message


def _content(value: Any, name: str) -> str:
    """Text, also where it comes as a list of OpenAI's {"type": "text", "text": ...} parts."""
    if not isinstance(value, list):
        return _text(value, name)
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise BadRow(Fault.FIELD, f"{name}[{index}] is {_show(part)}: only parts of type text can be trained on")
    return "".join(_text(part.get("text"), f"{name}[{index}].text") for index, part in enumerate(value))


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):  # a column of JSON text: nested schemas have no common parquet type
        try:
            value = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as problem:
            raise BadRow(Fault.FIELD, f"tools is text but not valid JSON: {problem}") from problem
    if not value:
        return None
    _refuse_surrogates(_list_of_objects(value, "tools"), "tools")
    return value


def _list_of_objects(value: Any, name: str, may_be_empty: bool = False) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRow(Fault.FIELD, f"{name} is {_show(value)}: it must be a list of objects")
    if not value and not may_be_empty:
        raise BadRow(Fault.FIELD, f"{name} is empty: it must hold at least one object")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadRow(Fault.FIELD, f"{name}[{index}] is {_show(item)}: it must be an object")
    return value


def _require_answer(messages: list[dict[str, Any]], name: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(Fault.NO_ANSWER, f"{name} has no assistant turn: there is nothing to train on")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(Fault.FIELD, f"{name} is {_show(value)}: it must be text")
    _refuse_surrogates(value, name)
    return value


def _answer(value: Any, name: str) -> str:
    if not _text(value, name).strip():
        raise BadRow(Fault.EMPTY, f"{name} is empty: there is nothing to train on")
    return value


def _refuse_surrogates(value: Any, name: str) -> None:
    """JSON can escape half a character (a lone surrogate), which no tokenizer can encode."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise BadRow(Fault.ENCODING, f"{name} holds a lone surrogate (half of a character): remove it")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_surrogates(key, name)
            _refuse_surrogates(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_surrogates(inner, f"{name}[{index}]")


def _show(value: Any) -> str:
    if value is None:
        return "missing"
    text = ascii(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
