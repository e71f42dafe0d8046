"""A progress bar over files that are read: on a terminal only, and in one process of a run."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dfactory.console import plain_console

Advance = Callable[[int], None]  # called with the number of further bytes read from a file


def unheard(count: int) -> None:
    """An Advance that does nothing, for reading without a bar."""


@contextlib.contextmanager
def reading(paths: Sequence[str | Path], label: str = "reading") -> Iterator[Advance]:
    """A bar over the bytes of all files together, on standard error."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield unheard
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=plain_console(stderr=True), transient=True) as bar:
        total = sum(Path(path).stat().st_size for path in paths if Path(path).is_file())
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
