"""Files of records -> checked Conversation, Completion or TokenIds, or Pairs of them. A bad row is a value, not a crash.

A format is recognised by its columns. To add one, write a function `row -> Record` that raises BadRow, and enter it
in FORMATS; the first entry whose columns are all there wins. Further columns are ignored; a null counts as absent.
Preference pairs are read in pairs.py.
"""

import codecs
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dfactory.data import fields
from dfactory.data.fields import BadRow, Completion, Conversation, Document, Fault, Record, TokenIds, check_messages
from dfactory.data.pairs import PAIR_FORMATS
from dfactory.data.progress import Advance, unheard
from dfactory.data.traces import TRACE_FORMATS
from dfactory.errors import DataError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
LONGEST_LINE = 1 << 22  # bytes, unpacked: tokenising such a text takes a gigabyte, and no max_length is that long
PARQUET_BATCH = 1024  # rows that are read together
PROGRESS_ROWS = 256  # between two words to the progress bar


def read_records(
    path: str | Path, prefer_pairs: bool = False, advance: Advance = unheard
) -> Iterator[tuple[int, Record | BadRow]]:
    """Stream (number, record) of a .jsonl, .jsonl.gz or .parquet file; numbers count lines, or parquet rows, from 1.

    A row that can be read as a pair and as a single answer is read as `prefer_pairs` says. `advance` hears the bytes.
    Raises DataError if the file is missing, damaged, of another kind, or holds no row at all.
    """
    for number, row in read_objects(path, advance):
        yield number, (row if isinstance(row, BadRow) else parse_row(row, prefer_pairs))


def read_objects(path: str | Path, advance: Advance = unheard) -> Iterator[tuple[int, Any]]:
    """The same with rows as they stand in the file; what is not JSON or not UTF-8 is a BadRow."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file: datasets.path must name a .jsonl, .jsonl.gz or .parquet file")
    empty = True
    for number, row in _rows(path, advance):
        empty = False
        yield number, row
    if empty:
        raise DataError(f"{path} holds no records: leave it out of datasets")


def parse_row(row: Any, prefer_pairs: bool = False) -> Record | BadRow:
    """Recognise and check one row; a BadRow is returned, so that the caller decides what it is worth."""
    try:
        return _recognise(row, prefer_pairs)(row)
    except BadRow as bad:
        return bad


# --- files -> rows ---------------------------------------------------------------------------------------------------


def _rows(path: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    if path.name.endswith(".parquet"):
        return _parquet_rows(path, advance)
    if path.name.endswith(".jsonl"):
        return _json_rows(path, lambda file: file, advance)
    if path.name.endswith(".jsonl.gz"):
        return _json_rows(path, lambda file: gzip.GzipFile(fileobj=file), advance)
    raise DataError(f"{path}: datasets.path must end in .jsonl, .jsonl.gz or .parquet")


def _json_rows(path: Path, unpack: Callable[[BinaryIO], Any], advance: Advance) -> Iterator[tuple[int, Any]]:
    number, position = 0, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(read_lines(unpack(file)), start=1):
                if number % PROGRESS_ROWS == 0:
                    here = os.lseek(file.fileno(), 0, os.SEEK_CUR)  # file.tell() is not to be had while lines are read
                    advance(here - position)
                    position = here
                if line.strip():
                    yield number, parse_line(line)
    except (EOFError, zlib.error, OSError) as problem:
        raise DataError(f"{path}:{number}: unreadable behind this line ({problem}): copy the file anew") from problem


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file without its byte order mark; of one longer than LONGEST_LINE, as much as tells that it is."""
    mark = codecs.BOM_UTF8
    while line := file.readline(LONGEST_LINE + 1):
        yield line.removeprefix(mark)
        mark = b""
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):  # a small .gz can hold a line that no memory does
            line = file.readline(LONGEST_LINE + 1)


def parse_line(line: bytes) -> Any:
    """The value of a line of JSON, or a BadRow."""
    if len(line) > LONGEST_LINE:
        return BadRow(Fault.LINE, f"the line has more than {LONGEST_LINE} bytes: split the record")
    return parse_json(line)


def parse_json(text: bytes) -> Any:
    """The value of a JSON text of any length, or a BadRow."""
    try:
        return fields.load_json(text.decode("utf-8"))
    except UnicodeDecodeError as problem:
        return BadRow(Fault.ENCODING, f"byte {problem.start} of the line is not UTF-8: convert the file to UTF-8")
    except ValueError as problem:
        return BadRow(Fault.JSON, f"not valid JSON: {problem}")


def _parquet_rows(path: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            bytes_per_row = path.stat().st_size // max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                advance(batch.num_rows * bytes_per_row)
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
    fields.require_answer(messages, "messages")
    return Conversation(messages, fields.tools(row.get("tools")))


def _read_sharegpt(row: dict) -> Conversation:
    turns = fields.list_of_objects(row["conversations"], "conversations")
    for index, turn in enumerate(turns):
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise BadRow(
                Fault.FIELD, f"conversations[{index}].from is {fields.show(speaker)}: it must be one of {known}"
            )
        fields.text(turn.get("value"), f"conversations[{index}].value")
    renamed = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    messages = check_messages(renamed, "conversations")
    fields.require_answer(messages, "conversations")
    return Conversation(messages, fields.tools(row.get("tools")))


def _read_token_ids(row: dict) -> TokenIds:
    ids, length = fields.integers(row["input_ids"], "input_ids"), row["prompt_lengths"]
    if type(length) is not int or not 0 <= length <= len(ids):
        raise BadRow(
            Fault.FIELD, f"prompt_lengths is {fields.show(length)}: it must be an integer from 0 to {len(ids)}"
        )
    return TokenIds(ids, length)


def _read_prompt_completion(row: dict) -> Conversation | Completion:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = check_messages(prompt, "prompt")
        answer = fields.answer_messages(completion, "completion")
        return Conversation(context + answer, fields.tools(row.get("tools")), trained_from=len(context))
    return Completion(fields.text(prompt, "prompt"), fields.answer(completion, "completion"))


def _read_instruction_response(row: dict) -> Conversation:
    return _single_turn(fields.text(row["instruction"], "instruction"), fields.answer(row["response"], "response"))


def _read_alpaca(row: dict) -> Conversation:
    instruction, extra = fields.text(row["instruction"], "instruction"), fields.text(row.get("input") or "", "input")
    question = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    return _single_turn(question, fields.answer(row["output"], "output"))


def _read_text(row: dict) -> Completion:
    """Running text, for continual pre-training: all of it is trainable."""
    return Completion("", fields.answer(row["text"], "text"))


FORMATS: dict[tuple[str, ...], Callable[[dict], Document]] = {
    **TRACE_FORMATS,  # first: such a line has kept the columns of its question
    ("messages",): _read_messages,
    ("conversations",): _read_sharegpt,
    ("input_ids", "prompt_lengths"): _read_token_ids,
    ("prompt", "completion"): _read_prompt_completion,
    ("instruction", "response"): _read_instruction_response,
    ("instruction", "output"): _read_alpaca,
    ("text",): _read_text,
}


def _recognise(row: Any, prefer_pairs: bool) -> Callable[[dict], Record]:
    if not isinstance(row, dict):
        raise BadRow(Fault.JSON, f"the row is {fields.show(row)}: it must be a JSON object")
    present = {name for name, value in row.items() if value is not None}
    formats = PAIR_FORMATS | FORMATS if prefer_pairs else FORMATS | PAIR_FORMATS
    for columns, reader in formats.items():
        if present.issuperset(columns):
            return reader
    known = "; ".join(" + ".join(columns) for columns in formats)
    raise BadRow(Fault.FORMAT, f"no known format has the columns {sorted(present)}: give one of {known}")


def _single_turn(question: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
