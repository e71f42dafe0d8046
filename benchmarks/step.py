"""A training step beside the obvious one: seconds, peak memory and loss of both, in one run.

    python -m benchmarks.step                                             # the table of benchmarks/LOG.md
    python -m benchmarks.step --length 1024 --batch 4 --vocabulary 8192   # one size
    python -m benchmarks.step --profile                                   # the shares of attention, experts, head, ...
    python -m benchmarks.step --shape mini --length 1024 --batch 2 --vocabulary 157184    # on a GPU: layers of LLaDA2-mini

A step is forward, backward, clipping and AdamW on `batch` documents of `length` tokens, half of them prompt, with a
complementary pair of views in blocks of 32. The obvious version (tests/reference.py) runs noisy ++ clean rows of twice
the length once a view, with a dense float mask, a loop over experts, and fp32 logits at all positions; its views' graphs
do not live at the same time. Sides take turns, a step each on new documents; the first step of each is not timed. Losses
are compared over all steps, so that gradients and updates are too. Memory is that of a second step, each side in a process
of its own that has run a small model before.
"""

import argparse
import contextlib
import functools
import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.parts import profile_step
from benchmarks.workload import (
    SHAPES,
    Documents,
    Lengths,
    Memory,
    Obvious,
    Ours,
    Records,
    Timed,
    interleave,
    largest_difference,
    measure_memory,
    sft_recipe,
    write_model,
    write_records,
)
from dfactory.types import ViewBatch

FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 2e-2  # of a loss, relative to the obvious version's
SIDES = {"obvious": (Obvious, "float32"), "fp32": (Ours, "float32"), "bf16": (Ours, "bfloat16")}


class Size(NamedTuple):
    length: int
    batch: int
    vocabulary: int
    shape: str = "small"  # of workload.SHAPES


TABLE = [Size(1024, 4, 8192), Size(2048, 2, 8192), Size(512, 2, 157184)]
SMOKE, SMOKE_STEPS = Size(64, 2, 512), 1


class Result(NamedTuple):
    timed: dict[str, Timed]

    def ratio(self, slow: str, fast: str) -> float:
        return self.timed[slow].median / self.timed[fast].median

    def difference(self, side: str) -> float:
        return largest_difference(self.timed[side].results, self.timed["obvious"].results)

    @property
    def is_equal(self) -> bool:
        return self.difference("fp32") < FP32_TOLERANCE and self.difference("bf16") < BF16_TOLERANCE


class Workload(NamedTuple):
    make: dict[str, Callable[[], Ours | Obvious]]
    records: Records
    windows: list[tuple[ViewBatch, Documents]]


@contextlib.contextmanager
def workload(size: Size, steps: int, more: int = 0) -> Iterator[Workload]:
    """A model directory and `steps` windows, in a folder that is gone afterwards; the records last for `more`."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder), size.vocabulary, size.shape)
        prompt = size.length // 2
        lengths = [Lengths(prompt, size.length - prompt)] * (size.batch * (steps + more))
        file = write_records(Path(folder) / "records.jsonl", lengths, size.vocabulary)
        keys = {"max_length": size.length, "packing": False, "per_device_train_batch_size": size.batch}
        recipe = functools.partial(sft_recipe, model_dir, file, size.vocabulary, **keys)
        records = Records(recipe())
        batches = [records.source.next_window()[0] for _ in range(steps)]
        make = {name: functools.partial(kind, recipe(dtype=dtype)) for name, (kind, dtype) in SIDES.items()}
        yield Workload(make, records, [(batch, records.padded(batch)) for batch in batches])


def time_steps(size: Size, steps: int) -> Result:
    with workload(size, steps + 1) as work:
        sides = {name: make() for name, make in work.make.items()}
        calls = {name: lambda number, side=side: side.step(*work.windows[number]) for name, side in sides.items()}
        return Result(interleave(calls, steps))


def memory_of(name: str, size: Size) -> Memory:
    with workload(size, 1) as work:
        return measure_memory(work.make[name], *work.windows[0])


def memory_alone(name: str, size: Size) -> Memory:
    """In a new process, after a small run that loads what any run loads, and whose memory is returned when it is freed."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc reads it when a process starts
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(memory_of, name, SMOKE).result()
        pool.submit(gc.collect).result()
        return pool.submit(memory_of, name, size).result()


def profile(size: Size, steps: int) -> None:
    for side in ("fp32", "bf16"):
        with workload(size, 0, more=steps + 2) as work:
            result = profile_step(work.make[side](), work.records.source, steps)
        print(f"{size}, {side}, {torch.get_num_threads()} thread(s)", *result.lines(), sep="\n", end="\n\n")


def add_rows(table: Table, size: Size, result: Result, memory: dict[str, Memory]) -> None:
    for name, timed in result.timed.items():
        first = name == "obvious"
        table.add_row(
            f"{size.shape}, L {size.length}, batch {size.batch}, V {size.vocabulary}" if first else "",
            name,
            f"{timed.median:.2f} ({min(timed.seconds):.2f} - {max(timed.seconds):.2f})",
            "" if first else f"{result.ratio('obvious', name):.1f}",
            *([f"{value / 2**20:,.0f}" for value in memory[name]] if memory else ["", ""]),
            f"{timed.results[0]:.6f}",
            f"{timed.results[-1]:.6f}",
            "" if first else f"{result.difference(name):.1e}",
        )


def describe(size: Size, result: Result, memory: dict[str, Memory]) -> str:
    parts = [f"{size}: bf16 {result.ratio('fp32', 'bf16'):.2f} times as fast as fp32"]
    if memory:
        share = memory["fp32"].above_parameters / memory["obvious"].above_parameters
        state_share = memory["fp32"].above_state / memory["obvious"].above_state
        parts.append(f"memory of fp32 {share:.3f} of the obvious, above the state {state_share:.3f}")
    if not result.is_equal:
        parts.append(f"LOSSES DIFFER by more than {FP32_TOLERANCE:g} in fp32 or {BF16_TOLERANCE:g} in bf16")
    return "; ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, help="tokens of a document; one size instead of the table")
    parser.add_argument("--batch", type=int, default=4, help="documents (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="seconds and losses only")
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes, instead")
    parser.add_argument("--smoke", action="store_true", help="a size for tests, without memory")
    options = parser.parse_args(arguments)

    sizes, steps = ([SMOKE], SMOKE_STEPS) if options.smoke else (TABLE, options.steps)
    if options.length is not None:
        sizes = [Size(options.length, options.batch, options.vocabulary, options.shape)]
    if options.profile:
        for size in sizes:
            profile(size, steps)
        return 0
    console, all_equal = Console(width=130, highlight=False), True
    columns = ["size", "side", "s a step (range)", "obvious / this", "MiB above parameters", "above state"]
    table = Table(*columns, "first loss", "last loss", "difference", title=f"{torch.get_num_threads()} thread(s)")
    for size in sizes:
        with_memory = not (options.smoke or options.no_memory)
        memory = {name: memory_alone(name, size) for name in SIDES} if with_memory else {}
        result = time_steps(size, steps)
        add_rows(table, size, result, memory)
        console.print(describe(size, result, memory))
        all_equal = all_equal and result.is_equal
    console.print(table)
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
