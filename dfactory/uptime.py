"""How long a process has been running."""

import time
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
