"""`profile_steps`: a torch trace and a picture of memory of some steps, for chrome://tracing, Perfetto and torch's viewers.

output_dir/profile/trace.json.gz    every operator and kernel of the steps, on the host's and the device's time line
output_dir/profile/operators.txt    the same as a table: seconds, calls and allocated memory by operator
output_dir/profile/memory.pickle    on a GPU: each allocation of the steps with its stack (pytorch.org/memory_viz)
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dfactory.runs.folder import writing

FOLDER = "profile"
LONGEST = 100  # rows of the table
ALLOCATIONS = 1_000_000  # that a GPU's allocator remembers


class StepProfiler:
    """Records the steps from `first` to `last`, on the first rank alone: `with profiler.step(n)` around each step."""

    def __init__(self, steps: list[int] | None, output_dir: Path, rank: int):
        self.steps = range(0) if steps is None or rank else range(steps[0], steps[1] + 1)
        self.folder = output_dir / FOLDER
        self._running: profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """`number` counts from 1. A run that begins within the steps is recorded from there."""
        if number not in self.steps:
            yield
            return
        if self._running is None:
            self._start()
        try:
            yield
        except BaseException:
            self._running.stop()
            raise
        if number == self.steps[-1]:
            self._finish()

    def _start(self) -> None:
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        self._running = profile(activities=[ProfilerActivity.CPU, *cuda], profile_memory=True, record_shapes=True)
        self._running.start()

    def _finish(self) -> None:
        running, self._running = self._running, None
        running.stop()
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(self.folder / "trace.json.gz"))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            table = running.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=LONGEST)
            (self.folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
