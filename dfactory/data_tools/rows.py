"""Record files for tools that copy rows: each row as it stands, and what the reader makes of it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dfactory.data.fields import BadRow, Fault, Record, show
from dfactory.data.progress import Advance, unheard
from dfactory.data.records import parse_row, read_objects
from dfactory.data_tools.command import say
from dfactory.errors import DataError

SHOWN = 5  # rows that are named one by one


class Row(NamedTuple):
    origin: str  # file:line
    fields: dict[str, Any]  # as they stand in the file
    record: Record


class Place(NamedTuple):
    """Where a row stands among the files of a command."""

    file_index: int
    number: int  # of the line, or of the row of a table, from 1


def read_rows(path: str, prefer_pairs: bool = False, advance: Advance = unheard) -> Iterator[Row]:
    """Stream a file of records. Raises DataError with file:line."""
    for number, fields in read_objects(path, advance):
        record = fields if isinstance(fields, BadRow) else parse_row(fields, prefer_pairs)
        if isinstance(record, BadRow):
            raise DataError(
                f"{path}:{number}: {record}; `dfactory data convert --skip-bad` leaves such rows out"
            ) from record
        yield Row(f"{path}:{number}", fields, record)


def read_all(
    files: Sequence[str], advance: Advance = unheard, after: Place | None = None
) -> Iterator[tuple[Place, dict[str, Any] | BadRow]]:
    """(place, row) of all files, `after` a place; what is no object is a BadRow."""
    for index, path in enumerate(files):
        if after is not None and index < after.file_index:
            continue
        for number, row in read_objects(path, advance):
            place = Place(index, number)
            if after is not None and place <= after:
                continue
            if not isinstance(row, (dict, BadRow)):
                row = BadRow(Fault.JSON, f"the row is {show(row)}: it must be a JSON object")
            yield place, row


class Refusals:
    """Rows that cannot be read: the first one is an error, or all are counted and the first few are told."""

    def __init__(self, skip: bool):
        self.skip, self.count = skip, 0

    def add(self, origin: str, bad: BadRow) -> None:
        """Raises DataError, unless they are skipped."""
        if not self.skip:
            raise DataError(f"{origin}: {bad}; or give --skip-bad") from bad
        self.count += 1
        if self.count <= SHOWN:
            say(f"refused {origin}: {bad}")

    def __str__(self) -> str:
        return f", {self.count:,} refused" if self.count else ""
