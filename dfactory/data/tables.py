"""Rows of everything that is not a local JSONL file, read by the `datasets` library.

    name: org/set                            a dataset on the hub, through the library's cache
    path: rows.json .parquet .arrow .csv     a local file

A row's address is the entry's label and the row's number from 1: `org/set[train]:17`, `rows.csv:17`.
"""

import glob
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dfactory.config.data import DatasetKeys
from dfactory.data.fields import BadRow, Fault
from dfactory.data.progress import Advance
from dfactory.errors import DataError
from dfactory.hub import missing, refusal

KINDS = {".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""Endings of local files, with the library's name of each format."""
BATCH = 1024  # rows that are read together

_COMMITS: dict[tuple[str | None, str | None], str] = {}  # (name, revision asked for) -> commit that this process read

Decode = Callable[[dict[str, Any]], dict[str, Any]]


def is_table(entry: DatasetKeys) -> bool:
    """Whether an entry of `datasets` is read here."""
    return entry.path is None or Path(entry.path).suffix in KINDS


def table_rows(entry: DatasetKeys, advance: Advance) -> Iterator[tuple[int, Any]]:
    """(number, row), in bounded memory. A local file is read where it is; data of the hub is downloaded to the cache first.

    Raises DataError for a file that cannot be read to its end, ConfigError for what the hub does not give.
    """
    number = told = 0
    size = Path(entry.path).stat().st_size if entry.path else 0
    rows = _load(entry, streaming=entry.path is not None)
    try:
        for batch in rows.iter(batch_size=BATCH):
            decode = _decoder(batch.schema)
            for index in range(batch.num_rows):
                number += 1
                yield number, _row(batch, index, decode)
            advance(min(batch.nbytes, size - told))
            told += min(batch.nbytes, size - told)
    except _unreadable() as problem:
        raise DataError(_damaged(entry, number, problem)) from problem


def commit_read(entry: DatasetKeys) -> str | None:
    """The commit of a hub's dataset that this process has read; None if it has not, or the library does not tell."""
    return _COMMITS.get((entry.name, entry.revision))


def commit_of(entry: DatasetKeys) -> str | None:
    """The same, after the dataset was read where it had not been."""
    if (entry.name, entry.revision) not in _COMMITS:
        _load(entry, streaming=False)
    return commit_read(entry) or entry.revision


class Table:
    """The rows of an entry by their number, mapped from the cache and not loaded; `checksum` is that of all of them."""

    def __init__(self, entry: DatasetKeys):
        self.name, self.checksum = entry.label, 0
        self._rows = _load(entry, streaming=False)
        self._decode = None
        for batch in self._rows.iter(batch_size=BATCH):
            self._decode = self._decode or _decoder(batch.schema)
            self.checksum = zlib.crc32(_content(batch), self.checksum)
        if not len(self):
            raise DataError(f"{self.name} holds no records: leave it out of datasets")

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any] | BadRow:
        return _row(self._rows[index : index + 1], 0, self._decode)


def _load(entry: DatasetKeys, streaming: bool):
    """The library's dataset, in Arrow format."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if entry.path is not None:
        kind, files = KINDS[Path(entry.path).suffix], glob.escape(entry.path)  # the library reads patterns
        try:
            loaded = datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming)
        except _unreadable() as problem:
            raise DataError(_damaged(entry, 0, problem)) from problem
        return loaded.with_format("arrow")
    told = f"datasets.name {entry.label} cannot be read"
    try:
        loaded = datasets.load_dataset(
            entry.name,
            entry.config,
            data_files=list(entry.data_files) or None,
            split=entry.split,
            revision=entry.revision,
        )
    except datasets.exceptions.DatasetNotFoundError as problem:
        raise missing(told, str(problem).rstrip(".")) from problem
    except _unreadable() as problem:
        raise refusal(problem, told, entry.revision) from problem
    for url in loaded.download_checksums or {}:  # hf://datasets/ORG/NAME@COMMIT/FILE
        if found := re.match(rf"hf://datasets/{re.escape(entry.name)}@([0-9a-f]{{40}})/", url):
            _COMMITS[entry.name, entry.revision] = found[1]
    return loaded.with_format("arrow")


def _unreadable() -> tuple[type[Exception], ...]:
    """What the library raises for data that it cannot give."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    return DatasetsError, pyarrow.ArrowException, OSError, ValueError


def _damaged(entry: DatasetKeys, number: int, problem: Exception) -> str:
    cause = str(problem.__cause__ or problem).strip().partition("\n")[0]
    return (
        f"{entry.label}:{number}: unreadable after this row ({cause[:300]}): the rows must be a table of one type a column; "
        "mend the file, or write .jsonl, an object a line"
    )


def _row(batch, index: int, decode: Decode) -> Any:
    try:
        return decode(batch.slice(index, 1).to_pylist()[0])
    except UnicodeDecodeError as problem:
        return BadRow(Fault.ENCODING, f"a string of the row is not UTF-8: {problem}")


def _decoder(schema) -> Decode:
    """What turns the library's JSON columns, which hold values of several types as text, back into values."""
    from datasets import Features

    features = Features.from_arrow_schema(schema)
    mixed = Features({name: feature for name, feature in features.items() if "Json(" in repr(feature)})
    if not mixed:
        return lambda row: row
    return lambda row: row | mixed.decode_example({name: row[name] for name in mixed})


def _content(batch) -> memoryview:
    """The bytes of some rows, whatever the library notes beside them."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.replace_schema_metadata(None).schema) as stream:
        stream.write_table(batch.replace_schema_metadata(None).combine_chunks())
    return memoryview(sink.getvalue())
