"""The start of a process: imports without the garbage collector, and how long the process has been running."""

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil


class Running(NamedTuple):
    """Seconds since the process started."""

    wall_s: float
    cpu_s: float  # of the processor, over all threads

    def since(self, earlier: "Running") -> "Running":
        return Running(self.wall_s - earlier.wall_s, self.cpu_s - earlier.cpu_s)


def running() -> Running:
    return Running(time.time() - psutil.Process().create_time(), time.process_time())


@contextlib.contextmanager
def importing(module: str) -> Iterator[None]:
    """A context in which a command imports `module` for the first time, with what it needs.

    Libraries make a million objects that stay. Looking through them for garbage again and again takes a quarter of the
    import's time, and of the time of what follows, so the collector pauses here and leaves them out from then on.
    """
    if module in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
