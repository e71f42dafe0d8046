"""Rows of a file with what the readers make of them; the first bad one is an error."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from dfactory.data.fields import BadRow, Record
from dfactory.data.progress import Advance, unheard
from dfactory.data.records import parse_row, read_objects
from dfactory.errors import DataError


class Row(NamedTuple):
    origin: str  # file:line
    fields: dict[str, Any]  # as they stand in the file
    record: Record


def read_rows(path: str, prefer_pairs: bool = False, advance: Advance = unheard) -> Iterator[Row]:
    """Stream a file of records. Raises DataError with file:line."""
    for number, fields in read_objects(path, advance):
        record = fields if isinstance(fields, BadRow) else parse_row(fields, prefer_pairs)
        if isinstance(record, BadRow):
            raise DataError(
                f"{path}:{number}: {record}; `dfactory data convert --skip-bad` leaves such rows out"
            ) from record
        yield Row(f"{path}:{number}", fields, record)
