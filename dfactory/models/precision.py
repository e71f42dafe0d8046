"""Which precision multiplies matrices faster here, measured: what a processor is called says nothing about its library."""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from dfactory.models.headers import weight_files

ROWS, WIDTH = 64, 1024  # of the product that is timed: about 0.1 GFLOP, a millisecond or two on a core in float32
ROUNDS = 4  # of both precisions in turn; the fastest counts, so that other work on the machine hardly matters
CLEARLY = 1.2  # times as fast, from which on one precision counts as the faster one; far from what noise moves


class Precision(NamedTuple):
    """The faster of two precisions, and why."""

    dtype: str  # bfloat16 or float32
    reason: str


@functools.cache
def faster_precision(device: str) -> Precision:
    """Of matrix products on a device. On a GPU bfloat16, unless it is older than that; on a CPU measured once a process, in
    tens of milliseconds."""
    if torch.device(device).type != "cpu":
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("float32", f"{torch.cuda.get_device_name()} emulates bfloat16")
        return Precision("bfloat16", "a GPU multiplies it faster")
    return choice(bfloat16_speed())


def choice(speed: float) -> Precision:
    """`speed`: how many times as fast as in float32 matrices are multiplied in bfloat16."""
    reason = f"this CPU multiplies matrices {speed:.2f} times as fast in bfloat16 as in float32 (measured)"
    return Precision("bfloat16" if speed >= CLEARLY else "float32", reason)


def slow_on(device: str) -> str | None:
    """Why a model in bfloat16 is better computed in float32 on this device; None where it is not clearly slower."""
    if torch.device(device).type == "cpu" and bfloat16_speed() > 1 / CLEARLY:
        return None
    faster = faster_precision(device)
    return faster.reason if faster.dtype == "float32" else None


def fits_in_float32(model_dir: Path) -> bool:
    """Whether a model that is stored in half precision fits twice as wide into half of the memory that is free now."""
    stored = sum(file.stat().st_size for file in weight_files(model_dir))
    return 2 * stored <= psutil.virtual_memory().available / 2


@functools.cache
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
    """Of a layer's forward product. Where bfloat16 is emulated that is its best case: on a CPU with AVX2 alone the backward
    pass, whose products have the weight as it lies, was 30 times as slow."""
    started = time.perf_counter()
    torch.nn.functional.linear(rows, weight)
    return time.perf_counter() - started
