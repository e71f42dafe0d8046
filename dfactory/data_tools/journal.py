"""An output of many rows that takes hours: it goes on where it was interrupted, and is refused to other settings.

FILE.partial holds the rows so far, and becomes FILE when all are in it. FILE.VERB.json beside it holds the settings, counts,
and the state after the last whole step. Both are on the disk after every step: rows after it are cut off when the work goes
on, and are made once more.
"""

import dataclasses
import fcntl
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dfactory.data.jsonlines import json_line
from dfactory.errors import ConfigError, DataError


@dataclasses.dataclass
class Journal:
    """`settings` decide what the rows are: another value of one is refused. `source` tells of the same for readers."""

    output: Path
    verb: str
    settings: dict[str, Any]
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the verb
    is_finished: bool = False
    size: int = 0  # bytes of the partial file that count
    _saved: Counter[str] = dataclasses.field(default_factory=Counter)
    _file: BinaryIO | None = None

    @property
    def record(self) -> Path:
        return self.output.with_name(f"{self.output.name}.{self.verb}.json")

    @property
    def partial(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial")

    @classmethod
    def of(cls, output: Path, verb: str, settings: Mapping[str, Any]) -> "Journal":
        """The journal beside an output, or a new one. Raises ConfigError where another work's output is in the way."""
        journal = cls(output, verb, json.loads(json.dumps(settings)))
        if not journal.record.is_file():
            if output.exists():
                raise ConfigError(
                    f"--output {output} exists, without {journal.record.name}: remove it, or name another"
                )
            return journal
        journal._read()
        return journal

    def _read(self) -> None:
        try:
            stored = json.loads(self.record.read_bytes())
            known, self.source, self.is_finished = stored["settings"], stored["source"], stored["is_finished"]
            self.counts, self.state, self.size = Counter(stored["counts"]), stored["state"], stored["bytes"]
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(f"{self.record} is damaged ({problem}): remove it and {self.partial.name}") from problem
        for name in {**known, **self.settings}:
            if known.get(name) != self.settings.get(name):
                raise ConfigError(
                    f"{self.output} was started with {name} {json.dumps(known.get(name))}, and is now asked for with "
                    f"{json.dumps(self.settings.get(name))}: give the same, name another --output, or remove "
                    f"{self.record}"
                )
        self._check_files()

    def _check_files(self) -> None:
        if self.output.is_file() and not self.partial.is_file():
            self.is_finished = True  # also where the process ended between the rename and the last record
        elif self.output.is_file():
            raise ConfigError(
                f"{self.output} and {self.partial.name} are both there: remove one, and {self.record.name}"
            )
        found = self.output if self.is_finished else self.partial
        if (found.stat().st_size if found.is_file() else 0) < self.size:
            raise DataError(f"{found} lacks rows that {self.record} counts: remove both to start again")

    def __enter__(self) -> "Journal":
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.partial.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"another process writes {self.partial}: wait for it, or name another --output") from None
        self._file.truncate(self.size)
        self._saved = Counter(self.counts)
        return self

    def __exit__(self, *_) -> None:
        """Leave what was saved."""
        self._file.close()
        if not self.is_finished:
            os.truncate(self.partial, self.size)
            self.counts = self._saved

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; it counts from the next `save` on."""
        self._file.write(json_line(row))

    def save(self) -> None:
        """Make what was written since the last call, the counts and the state durable, all at once."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.size = os.fstat(self._file.fileno()).st_size
        self._store()
        self._saved = Counter(self.counts)

    def finish(self) -> None:
        """Give the output its name."""
        self.partial.replace(self.output)
        self.is_finished, self.state = True, {}
        self._store()

    def _store(self) -> None:
        stored = {
            "settings": self.settings,
            "source": self.source,
            "is_finished": self.is_finished,
            "counts": dict(self.counts),
            "state": self.state,
            "bytes": self.size,
        }
        temporary = self.record.with_name(f"{self.record.name}.partial")
        temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.record)
