"""Which precision multiplies matrices faster here, measured: what a processor is called says nothing about its library."""

import functools
import time
from typing import NamedTuple

import torch

ROWS, WIDTH = 256, 1024  # of the product that is timed: about 0.5 GFLOP, some milliseconds on a core
ROUNDS = 4  # of both precisions in turn; the fastest counts, so that other work on the machine hardly matters
CLEARLY = 1.2  # times as fast, from which on bfloat16 is worth its rounding; far from what noise moves


class Precision(NamedTuple):
    """The faster of two precisions, and why."""

    dtype: str  # bfloat16 or float32
    reason: str


@functools.cache
def faster_precision(device: str) -> Precision:
    """Of matrix products on a device. On a GPU bfloat16; on a CPU measured once a process, in tens of milliseconds."""
    if torch.device(device).type != "cpu":
        return Precision("bfloat16", "a GPU multiplies it faster")
    return choice(bfloat16_speed())


def choice(speed: float) -> Precision:
    """`speed`: how many times as fast as in float32 matrices are multiplied in bfloat16."""
    reason = f"this CPU multiplies matrices {speed:.2f} times as fast in bfloat16 as in float32 (measured)"
    return Precision("bfloat16" if speed >= CLEARLY else "float32", reason)


@torch.no_grad()
def bfloat16_speed() -> float:
    """Seconds of a product in float32 over those in bfloat16, after one of each that is not timed."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    pairs = {dtype: (rows.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    rounds = [[_seconds(*pair) for pair in pairs.values()] for _ in range(1 + ROUNDS)]
    full, half = (min(times) for times in zip(*rounds[1:], strict=True))
    return full / half


def _seconds(rows: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    rows @ weight
    return time.perf_counter() - started
