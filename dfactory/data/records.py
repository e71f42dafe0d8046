"""Files of records -> checked Conversation, Completion or TokenIds, or Pairs of them. A bad row is a value, not a crash.

A format is recognised by its columns. To add one, write a function `row -> Record` that raises BadRow, and enter it
in FORMATS; the first entry whose columns are all there wins. A null counts as absent; what further columns mean is in
columns.py. Preference pairs are read in pairs.py.
"""

import codecs
import gzip
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dfactory.config.data import DatasetKeys
from dfactory.config.words import RECORD_FILES
from dfactory.data import columns, fields
from dfactory.data.columns import ASKED, SYSTEM, Format, asked, said, sharegpt_messages, with_system
from dfactory.data.entries import entry_of
from dfactory.data.fields import BadRow, Completion, Conversation, Fault, Pair, Record, TokenIds, check_messages
from dfactory.data.pairs import PAIR_FORMATS, refuse_tie
from dfactory.data.progress import Advance, unheard
from dfactory.data.rewriting import rewriter
from dfactory.data.tables import is_table, table_rows
from dfactory.data.traces import TRACE_FORMATS
from dfactory.errors import DataError

LONGEST_LINE = 1 << 22  # bytes, unpacked: tokenising such a text takes a gigabyte, and no max_length is that long
PROGRESS_ROWS = 256  # between two words to the progress bar


def read_records(
    source: str | Path | DatasetKeys,
    prefer_pairs: bool = False,
    advance: Advance = unheard,
    unread: Counter[str] | None = None,
) -> Iterator[tuple[int, Record | BadRow]]:
    """Stream (number, record) of a file, of a name on the hub, or of an entry of `datasets`; numbers count lines, or rows of
    a table, from 1.

    A row that can be read as a pair and as a single answer is read as `prefer_pairs` says. `advance` is called with the
    bytes read; `unread` counts the rows by text columns that no reader uses.
    Raises DataError if the file is missing, damaged, of another kind, or holds no row at all.
    """
    for number, row in read_objects(source, advance):
        yield number, (row if isinstance(row, BadRow) else parse_row(row, prefer_pairs, unread))


def read_objects(source: str | Path | DatasetKeys, advance: Advance = unheard) -> Iterator[tuple[int, Any]]:
    """The same with rows as they stand there, but for what the keys of the entry change (rewriting.py); what is not JSON
    or not UTF-8 is a BadRow."""
    entry, empty = entry_of(source), True
    rewrite = rewriter(entry)
    for number, row in _rows(entry, advance):
        empty = False
        yield number, rewrite(row)
    if empty:
        raise DataError(f"{entry.label} holds no records: leave it out of datasets")


def parse_row(row: Any, prefer_pairs: bool = False, unread: Counter[str] | None = None) -> Record | BadRow:
    """Recognise and check one row; a BadRow is returned, so that the caller decides what it is worth."""
    try:
        names, form = _recognise(row, prefer_pairs)
        record = columns.weighed(row, form.read(row))
        if form.strict:
            columns.refuse_unread(row, (*names, *form.also), record)
            columns.refuse_bad_answer(row, record)
            if isinstance(record, Pair):
                refuse_tie(row)
    except BadRow as bad:
        return bad
    if unread is not None:
        unread.update(columns.unread_texts(row, (*names, *form.also)))
    return record


def read_columns(row: dict, prefer_pairs: bool = False) -> set[str]:
    """The columns that a record is read from. Raises BadRow where the format is unknown."""
    names, form = _recognise(row, prefer_pairs)
    return {*names, *form.also}


# --- files -> rows ---------------------------------------------------------------------------------------------------


def _rows(entry: DatasetKeys, advance: Advance) -> Iterator[tuple[int, Any]]:
    if entry.path is None:
        return table_rows(entry, advance)
    path = Path(entry.path)
    if not path.is_file():
        raise DataError(
            f"{path} is not a file: datasets.path must name a {RECORD_FILES} file; a dataset of the hub is a name"
        )
    if is_table(entry):
        return table_rows(entry, advance)
    if path.name.endswith(".jsonl"):
        return _json_rows(path, lambda file: file, advance)
    if path.name.endswith(".jsonl.gz"):
        return _json_rows(path, lambda file: gzip.GzipFile(fileobj=file), advance)
    raise DataError(f"{path}: datasets.path must end in {RECORD_FILES}")


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
        raise DataError(f"{path}:{number}: unreadable after this line ({problem}): copy the file again") from problem


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


# --- rows -> records -------------------------------------------------------------------------------------------------


def _read_messages(row: dict) -> Conversation:
    messages = with_system(row, check_messages(row["messages"], "messages"))
    if (
        messages[-1]["role"] != "assistant"
        and not any(map(fields.is_trained, messages))
        and row.get("answer") is not None
    ):
        messages = [*messages, said("assistant", _answer_column(row))]
    fields.require_answer(messages, "messages")
    return Conversation(messages, fields.tools(row.get("tools")))


def _read_sharegpt(row: dict) -> Conversation:
    messages = with_system(row, sharegpt_messages(row["conversations"], "conversations"))
    fields.require_answer(messages, "conversations")
    return Conversation(messages, fields.tools(row.get("tools")))


def _read_token_ids(row: dict) -> TokenIds:
    ids, length = fields.integers(row["input_ids"], "input_ids"), row["prompt_lengths"]
    if type(length) is not int or not 0 <= length <= len(ids):
        raise BadRow(
            Fault.FIELD, f"prompt_lengths is {fields.show(length)}: it must be an integer from 0 to {len(ids)}"
        )
    record = TokenIds(ids, length)
    columns.refuse_other_labels(row, record)
    return record


def _read_prompt_completion(row: dict) -> Conversation | Completion:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _answered(row, fields.answer_messages(completion, "completion"))
    return _plain_text(row, fields.answer(completion, "completion"))


def _read_prompt_answer(row: dict) -> Conversation | Completion:
    if isinstance(row["prompt"], list):
        return _answered(row, [said("assistant", _answer_column(row))])
    return _plain_text(row, _answer_column(row))


def _answered(row: dict, answer: list[dict]) -> Conversation:
    """A conversational prompt and what follows."""
    context = with_system(row, check_messages(row["prompt"], "prompt"))
    return Conversation(context + answer, fields.tools(row.get("tools")), trained_from=len(context))


def _plain_text(row: dict, answer: str) -> Completion:
    columns.refuse_beside_text(row)
    return Completion(fields.text(row["prompt"], "prompt"), answer)


def _answer_column(row: dict) -> str:
    """Text, or a number, as answers of arithmetic are exported."""
    value = row["answer"]
    return fields.answer(str(value) if type(value) in (int, float) else value, "answer")


def _instruction(question: str, response: str) -> Callable[[dict], Conversation]:
    """A reader of rows with a question in one column and its answer in another."""

    def read(row: dict) -> Conversation:
        answer = _answer_column(row) if response == "answer" else fields.answer(row[response], response)
        return Conversation([*asked(row, question), said("assistant", answer)], fields.tools(row.get("tools")))

    return read


def _read_text(row: dict) -> Completion:
    """Running text, for continual pre-training: all of it is trainable."""
    return Completion("", fields.answer(row["text"], "text"))


FORMATS: dict[tuple[str, ...], Format] = {
    **TRACE_FORMATS,  # first: such a line has kept the columns of its question
    ("messages",): Format(_read_messages, (*SYSTEM, "tools")),
    ("conversations",): Format(_read_sharegpt, (*SYSTEM, "tools")),
    ("input_ids", "prompt_lengths"): Format(_read_token_ids, ("labels", "attention_mask"), strict=False),
    ("prompt", "completion"): Format(_read_prompt_completion, (*SYSTEM, "tools")),
    ("instruction", "response"): Format(_instruction("instruction", "response"), ASKED),
    ("instruction", "output"): Format(_instruction("instruction", "output"), ASKED),
    ("question", "response"): Format(_instruction("question", "response"), ASKED),
    ("prompt", "answer"): Format(_read_prompt_answer, (*SYSTEM, "tools")),
    ("question", "answer"): Format(_instruction("question", "answer"), ASKED),
    ("text",): Format(_read_text, strict=False),
}


def _recognise(row: Any, prefer_pairs: bool) -> tuple[tuple[str, ...], Format]:
    if not isinstance(row, dict):
        raise BadRow(Fault.JSON, f"the row is {fields.show(row)}: it must be a JSON object")
    present = {name for name, value in row.items() if value is not None}
    formats = PAIR_FORMATS | FORMATS if prefer_pairs else FORMATS | PAIR_FORMATS
    for names, form in formats.items():
        if present.issuperset(names):
            return names, form
    known = "; ".join(" + ".join(names) for names in formats)
    raise BadRow(Fault.FORMAT, f"no known format has the columns {sorted(present)}: give one of {known}")
