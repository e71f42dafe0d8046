"""How far a long work on prompts is: a bar on a terminal, else a line now and then."""

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dfactory.console import plain_console
from dfactory.data_tools.command import say

LINE_S = 30.0  # seconds between two lines


class Meter:
    """`total` prompts, of which `done` were answered in an earlier process."""

    def __init__(self, total: int, done: int):
        self._total, self._begun_with, self._done = total, done, done
        self._began = self._last_line = time.monotonic()
        self._tokens, self._note = 0, ""
        columns = TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
        console = plain_console(stderr=True)
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not sys.stderr.isatty()
        )
        self._task = self._bar.add_task("answering", total=total, completed=done, note="")

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(self.seconds, 1e-9)

    def add_tokens(self, count: int) -> None:
        self._tokens += count
        self._bar.update(self._task, note=self._rate())

    def show(self, done: int, note: str) -> None:
        """So many prompts are answered."""
        self._done, self._note = done, note
        self._bar.update(self._task, completed=done, note=self._rate())
        if self._bar.disable and time.monotonic() - self._last_line >= LINE_S:
            self._last_line = time.monotonic()
            say(f"{done:,} of {self._total:,} prompts, {self._rate()}{self._time_left()}")

    def _time_left(self) -> str:
        """Unknown until a batch is answered."""
        if self._done == self._begun_with:
            return ""
        left = (self._total - self._done) * self.seconds / (self._done - self._begun_with)
        return f", about {left / 60:.0f} min left"

    def _rate(self) -> str:
        return f"{self._note}, {self.tokens_per_second:,.0f} tokens/s"
