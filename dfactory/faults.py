"""Faults for tests: the process dies, or its disk fails, at a named point of saving.

    DFACTORY_FAULT=point[@rank]:n[:kind]      the n-th time (from 1) that this rank passes the point; rank 0 by default

Without the variable a point does nothing. Kinds:

kill      SIGKILL; the default
half      SIGKILL after half of the file was written (of a directory: after half of its files were removed)
short     half of the file was written without an error, and the process continues
enospc    half of the file was written, then OSError: no space left on the device
"""

import collections
import errno
import os
import signal
from pathlib import Path

VARIABLE = "DFACTORY_FAULT"

_passed: collections.Counter[str] = collections.Counter()


def at(point: str, path: Path | None = None, start: int = 0) -> None:
    """Mark a named point of saving. `path` was just written, from byte `start` on, or is about to be removed."""
    if VARIABLE not in os.environ:
        return
    _passed[point] += 1
    where, count, kind = (os.environ[VARIABLE] + ":kill").split(":")[:3]
    name, _, rank = where.partition("@")
    if (name, rank or "0", count) == (point, os.environ.get("RANK", "0"), str(_passed[point])):
        _strike(point, path, start, kind)


def after_each_save(writer, name: str) -> None:
    """Mark points before and after each file that a library writes with `writer.save(state, path)`."""
    if VARIABLE not in os.environ or "save" in vars(writer):
        return
    save = writer.save

    def watched(state_dict, path):
        at(f"{name}.writing")
        save(state_dict, path)
        at(f"{name}.written", Path(path))

    writer.save = watched


def _strike(point: str, path: Path | None, start: int, kind: str) -> None:
    if kind != "kill" and path is not None:
        _halve(path, start)
    if kind == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (by {VARIABLE} at {point})", path and str(path))
    if kind != "short":
        os.kill(os.getpid(), signal.SIGKILL)


def _halve(path: Path, start: int) -> None:
    if path.is_file():
        os.truncate(path, (start + path.stat().st_size) // 2)
        return
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()
