"""Records that are read during training (`streaming: true`): start-up and memory do not grow with the texts.

At the start the files are read once, to find the start of each line and to compute a checksum, and the first lines are
tokenised, so that errors which affect all of them are reported at once. Tables are mapped from the cache of the `datasets`
library instead. Afterwards lines are tokenised in the order in which the run visits them, some hundred at a time; one that
was visited too long ago is tokenised again. A unit is a line, or a row of a table. Order, packing and noise are the same as
when all records are read at the start, if none of them is bad.

What is given up: the number of steps is not known beforehand (max_steps has to say it), bad rows come to light when they are
visited, and every rank tokenises the whole stream, because rows are packed by the lengths of all.
"""

import codecs
import dataclasses
import functools
import itertools
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dfactory.config.data import DatasetKeys
from dfactory.data.chat import ChatEncoder
from dfactory.data.examples import (
    LINE_BITS,
    DataReport,
    DocumentRules,
    EncodedRow,
    Examples,
    ExamplesBuilder,
    read_documents,
    require_kind,
)
from dfactory.data.fields import BadRow, Record
from dfactory.data.progress import Advance, reading
from dfactory.data.records import LONGEST_LINE, parse_line, parse_row
from dfactory.data.rewriting import changes_of, rewriter
from dfactory.data.tables import Table, is_table
from dfactory.errors import ConfigError, DataError
from dfactory.types import Example

KEPT = 4096  # units that stay tokenised
CHECKED = 1024  # lines that are read at the start, and from which on max_bad_fraction is held against what was read
PIECE = 1 << 24  # bytes that are looked through at once for the ends of lines


BLANK = object()


class Numbered(Protocol):
    """Records that can be found again by their number from 0; an address is name:number + 1."""

    name: str
    checksum: int

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any:
        """The value there, a BadRow for what is none, BLANK where nothing stands."""


def numbered(entry: DatasetKeys, advance: Advance) -> Numbered:
    """The records of an entry of `datasets`. Raises DataError for one that cannot be read, and for one without records."""
    return Table(entry) if is_table(entry) else Lines(entry.path, advance)


class Lines:
    """A .jsonl file by line. Raises DataError for another kind of file, and for one without a line."""

    def __init__(self, path: str, advance: Advance):
        if not path.endswith(".jsonl") or not Path(path).is_file():
            raise DataError(
                f"{path}: streaming: true reads .jsonl files, whose lines can be found again, and tables; "
                "`dfactory data convert` writes one"
            )
        self._file = open(path, "rb")  # noqa: SIM115  (as long as the run)
        self.name, self.checksum, ends, position = path, 0, [np.zeros(1, np.int64)], 0
        while piece := self._file.read(PIECE):
            ends.append(position + 1 + np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")))
            self.checksum = zlib.crc32(piece, self.checksum)
            position += len(piece)
            advance(len(piece))
        self._end_L1 = np.union1d(np.concatenate(ends), [position])  # the last line may lack its end
        if position == 0:
            raise DataError(f"{path} holds no records: leave it out of datasets")

    def __len__(self) -> int:
        """Lines, blank ones included."""
        return len(self._end_L1) - 1

    def __getitem__(self, index: int) -> bytes:
        start, stop = self._end_L1[index : index + 2].tolist()
        line = os.pread(self._file.fileno(), min(stop - start, LONGEST_LINE + 1), start)
        return line.removeprefix(codecs.BOM_UTF8) if index == 0 else line

    def row(self, index: int) -> Any:
        line = self[index]
        return parse_line(line) if line.strip() else BLANK


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokenised units."""

    examples: Examples | None  # None if all of them are bad
    place: dict[int, int]  # unit -> its number in `examples`, -1 for a bad one
    measured: dict[Callable, np.ndarray] = dataclasses.field(default_factory=dict)

    def measure(self, measure: Callable[[Examples], np.ndarray], unit: int) -> int:
        if self.place[unit] < 0:
            return 0
        if measure not in self.measured:
            self.measured[measure] = measure(self.examples)
        return int(self.measured[measure][self.place[unit]])


@dataclasses.dataclass
class StreamReport(DataReport):
    """Counts of the lines that have been read so far."""

    lines: int = 0

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.lines} lines of {len(self.files)} file(s), read while training goes on", *self.tell_unread()]
        )


class StreamedExamples:
    """Stands where Examples stand, for a RecordSource. Raises as `load_examples` does, when a line is read."""

    def __init__(
        self,
        datasets: Sequence[DatasetKeys],
        encoder: ChatEncoder | None,
        rules: DocumentRules,
        *,
        on_bad_row: str,
        max_bad_fraction: float,
        block_size: int,
        paired: bool,
        fill_unit: int | None = None,
    ):
        if rules.overlong == "split":
            raise ConfigError(
                "overlong: split with streaming: true: a line is one document there; use truncate or refuse"
            )
        self._encoder, self._rules, self._paired = encoder, rules, paired
        self._on_bad_row, self._max_bad_fraction = on_bad_row, max_bad_fraction
        self._block_size, self._fill_unit = block_size, fill_unit
        self.unit_size = 2 if paired else 1
        with reading([entry.path for entry in datasets if entry.path], "looking for lines") as advance:
            self._files = [numbered(entry, advance) for entry in datasets]
        self._rewrite = [rewriter(entry) for entry in datasets]
        self._changes = "".join(changes for entry in datasets if (changes := changes_of(entry)))
        self._first_F1 = np.cumsum([0, *(len(lines) for lines in self._files)])
        self._chunks: deque[Chunk] = deque()  # the newest last
        self._chunk_of: dict[int, Chunk] = {}
        self._seen_U = np.zeros(len(self), bool)
        self.report = StreamReport([entry.label for entry in datasets], unit_size=self.unit_size, lines=len(self))
        self.prefetch(range(min(CHECKED, len(self))))  # report errors that affect all records at once

    def __len__(self) -> int:
        return int(self._first_F1[-1])

    @property
    def fingerprint(self) -> int:
        """A checksum of all files, and of what their entries change in the rows."""
        crc = functools.reduce(lambda crc, lines: zlib.crc32(str(lines.checksum).encode(), crc), self._files, 0)
        return zlib.crc32(self._changes.encode(), crc)

    @property
    def file_index_U(self) -> np.ndarray:
        """Which of the files each unit came from."""
        return np.repeat(np.arange(len(self._files), dtype=np.int16), np.diff(self._first_F1))

    def unit(self, index: int) -> list[Example]:
        """The documents of a line."""
        chunk = self.chunk(index)
        return chunk.examples.unit(chunk.place[index])

    def unit_id(self, index: int) -> int:
        """The name of a unit's documents."""
        file_index, number = self._place(index)
        return file_index << LINE_BITS | number

    def unit_weight(self, index: int) -> float:
        """What a line counts in the loss."""
        chunk = self.chunk(index)
        return chunk.examples.unit_weight(chunk.place[index])

    def map_units(self, measure: Callable[[Examples], np.ndarray]) -> "MappedUnits":
        """A number for each unit, 0 for a bad one."""
        return MappedUnits(self, measure)

    def prefetch(self, index_V: Iterable[int]) -> None:
        """Tokenise these units, which are wanted next."""
        wanted = sorted({int(index) for index in index_V}.difference(self._chunk_of))
        if not wanted:
            return
        chunk = self._read(wanted)
        self._chunks.append(chunk)
        self._chunk_of.update(dict.fromkeys(chunk.place, chunk))
        while len(self._chunk_of) > KEPT and len(self._chunks) > 1:
            for index in self._chunks.popleft().place:
                del self._chunk_of[index]

    def chunk(self, index: int) -> Chunk:
        """The one that holds a unit; it is read again where it was forgotten."""
        if index not in self._chunk_of:
            self.prefetch([index])
        return self._chunk_of[index]

    def _read(self, units: list[int]) -> Chunk:
        """Raises DataError for a bad line (on_bad_row "error"), and for too large a share of them ("skip")."""
        report = DataReport(self.report.files, self.unit_size)
        builder = ExamplesBuilder(report, self._on_bad_row, self._block_size, self._fill_unit)
        place = dict.fromkeys(units, -1)
        for unit, row in self._rows(units):
            require_kind(row.record, self._paired, self._origin(unit))
            place[unit] = builder.report.num_rows if row.finished and not isinstance(row.finished, BadRow) else -1
            builder.add(self.unit_id(unit), row.finished)
            self._count(unit, row)
        if np.count_nonzero(self._seen_U) >= min(CHECKED, len(self)):
            self.report.refuse_share_above(self._max_bad_fraction)
        return Chunk(builder.examples() if builder.report.kept else None, place)

    def _count(self, unit: int, row: EncodedRow) -> None:
        """In the report, once."""
        if self._seen_U[unit]:
            return
        self._seen_U[unit] = True
        if isinstance(row.finished, BadRow):
            self.report.refuse(self._origin(unit), row.finished)
        elif row.finished:
            self.report.kept += self.unit_size

    def _rows(self, units: list[int]) -> Iterator[tuple[int, EncodedRow]]:
        """The records of ascending units, blank lines left out."""
        for file_index, group in itertools.groupby(units, key=lambda unit: self._place(unit)[0]):
            file, first = self._files[file_index], int(self._first_F1[file_index])
            rewrite = self._rewrite[file_index]
            found = [(unit, rewrite(row)) for unit in group if (row := file.row(unit - first)) is not BLANK]
            records = [
                (unit - first + 1, row if isinstance(row, BadRow) else self._parse(unit, row)) for unit, row in found
            ]
            rows = read_documents(iter(records), file.name, self._encoder, self._rules)
            yield from zip((unit for unit, _ in found), rows, strict=True)

    def _parse(self, unit: int, row: Any) -> Record | BadRow:
        """A line's record; its unused text columns are counted the first time it is read."""
        return parse_row(row, self._paired, None if self._seen_U[unit] else self.report.unread)

    def _place(self, unit: int) -> tuple[int, int]:
        """(index of its file, number of its line from 1)."""
        file_index = int(np.searchsorted(self._first_F1, unit, "right")) - 1
        return file_index, unit - int(self._first_F1[file_index]) + 1

    def _origin(self, unit: int) -> str:
        file_index, number = self._place(unit)
        return f"{self._files[file_index].name}:{number}"


@dataclasses.dataclass(frozen=True, eq=False)
class MappedUnits:
    """The numbers of units, computed on access."""

    examples: StreamedExamples
    measure: Callable[[Examples], np.ndarray]

    def __getitem__(self, unit: int) -> int:
        return self.examples.chunk(unit).measure(self.measure, unit)
