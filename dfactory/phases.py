"""Seconds of a step by phase, such as forward and backward.

A phase within another one takes its time away from it, so that phases add up. On a GPU, which works on after the host has
given it work, events in its stream are compared: the host waits for none of them in the middle of a step.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch


class Phases:
    """Used by one thread. `with phases("forward"): ...`, and `taken()` once a step."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._open: list[str] = []  # phases that are running, from the outermost
        self._marks: list[tuple[str | None, Any]] = []  # from when on which phase counts

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def taken(self) -> dict[str, float]:
        """Seconds by phase since the last call, as metrics `seconds/NAME`. Waits for what the GPU has been given."""
        self._mark()
        seconds: dict[str, float] = defaultdict(float)
        if self.on_gpu:
            self._marks[-1][1].synchronize()
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                seconds[f"seconds/{name}"] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        del self._marks[:-1]
        return dict(seconds)

    def _mark(self) -> None:
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._open[-1] if self._open else None, now))
