"""SHA-256 of the files that a run reads, computed by a thread of the first rank beside the run.

Nothing waits for it but the last checkpoint of a run, and that for WAIT_S at most: 50 GB take about a minute of one core.
A file that is not hashed has no sum, and a note that says why: a sum of a file's size, time or beginning is no substitute.
"""

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PIECE = 1 << 20  # bytes that are read at once
WAIT_S = 60.0

NOT_YET = "not hashed: the run ended before the file was read"
CHANGED = "not hashed: the file changed while the run read it"


class Hashed(NamedTuple):
    """What is known of a file."""

    sha256: str | None = None
    lines: int | None = None  # blank ones included
    note: str = NOT_YET  # why there is no sum


class Hashes:
    """The sums of some files, in the order in which they are given. They are read by a thread, from now on."""

    def __init__(self, files: Iterable[Path]):
        self._found: dict[Path, Hashed] = {}
        self._stamps = {file: _stamp(file) for file in files}
        self._thread = threading.Thread(target=self._read, name="hashes", daemon=True)
        self._thread.start()

    def of(self, file: Path) -> Hashed:
        """What is known by now."""
        return self._found.get(file, Hashed())

    def wait(self, seconds: float = WAIT_S) -> None:
        self._thread.join(seconds)

    def _read(self) -> None:
        for file, stamp in self._stamps.items():
            found = hash_file(file)
            changed = found.sha256 is not None and _stamp(file) != stamp
            self._found[file] = Hashed(note=CHANGED) if changed else found


def hash_file(file: Path) -> Hashed:
    """The sum of a file. One that cannot be read has a note instead."""
    sha256, lines, last = hashlib.sha256(), 0, b"\n"
    try:
        with file.open("rb") as stream:
            while piece := stream.read(PIECE):
                sha256.update(piece)
                lines += piece.count(b"\n")
                last = piece[-1:]
    except OSError as problem:
        return Hashed(note=f"not hashed: {problem.strerror or type(problem).__name__}")
    return Hashed(sha256.hexdigest(), lines + (last != b"\n"), "")


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        known = file.stat()
    except OSError:
        return None
    return known.st_size, known.st_mtime_ns
