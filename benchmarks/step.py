"""A training step beside the opponent's: seconds, peak memory and loss of both, in one run.

    python -m benchmarks.step                                             # the table of benchmarks/LOG.md
    python -m benchmarks.step --length 1024 --batch 4 --vocabulary 8192   # one size
    python -m benchmarks.step --length 1024 --main ../dFactory            # and the same step by another checkout
    python -m benchmarks.step --profile                                   # the shares of attention, experts, head, ...
    python -m benchmarks.step --shape mini --length 1024 --batch 2 --vocabulary 157184    # on a GPU: layers of LLaDA2-mini

A step is forward, backward, clipping and AdamW on `batch` documents of `length` tokens, half of them prompt, with one view
or a complementary pair of views in blocks of 32. The opponent (benchmarks/opponent.py) runs noisy ++ clean rows of twice the
length, one a view, with the parts that the best public programs have. Sides take turns, a step each on new documents; the
first step of each is not timed. Losses are compared over all steps, so that gradients and updates are too. Memory is that of
a second step, each side in a process of its own that has run a small model before. On a GPU the opponent runs in bfloat16
too, and our bf16 step is compared with that.
"""

import argparse
import contextlib
import functools
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import (
    GIVES_BACK,
    Elsewhere,
    Memory,
    Timed,
    interleave,
    largest_difference,
    measure_memory,
    row_of,
    write_rows,
)
from benchmarks.opponent_training import NoisyRow
from benchmarks.parts import profile_step
from benchmarks.workload import (
    SHAPES,
    Lengths,
    Opponent,
    Ours,
    Records,
    sft_recipe,
    write_model,
    write_records,
)
from dfactory.types import ViewBatch

FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 2e-2  # of a loss, relative to the opponent's in fp32
SIDES = {
    "opponent": (Opponent, "float32"),
    "main": (Ours, "float32"),  # of another checkout
    "fp32": (Ours, "float32"),
    "opponent bf16": (Opponent, "bfloat16"),
    "main bf16": (Ours, "bfloat16"),
    "bf16": (Ours, "bfloat16"),
}
OF_MAIN = {"main", "main bf16"}


class Size(NamedTuple):
    length: int
    batch: int
    vocabulary: int
    shape: str = "small"  # of workload.SHAPES
    views: int = 2  # a complementary pair, or 1


TABLE = [Size(1024, 4, 8192), Size(2048, 2, 8192), Size(512, 2, 157184)]
SMOKE, SMOKE_STEPS = Size(64, 2, 512), 1


class Result(NamedTuple):
    timed: dict[str, Timed]

    def baseline(self, side: str) -> str:
        """The side that another one is compared with."""
        return "opponent bf16" if side in ("bf16", "main bf16") and "opponent bf16" in self.timed else "opponent"

    def ratio(self, side: str) -> float:
        """Seconds of the processor, the opponent's to a side's."""
        return self.timed[self.baseline(side)].cpu_median / self.timed[side].cpu_median

    def wall_ratio(self, side: str) -> float:
        return self.timed[self.baseline(side)].median / self.timed[side].median

    def difference(self, side: str) -> float:
        return largest_difference(self.timed[side].results, self.timed["opponent"].results)

    @property
    def differences(self) -> dict[str, float]:
        return {side: self.difference(side) for side in self.timed if side != "opponent"}

    @property
    def is_equal(self) -> bool:
        within = {"bfloat16": BF16_TOLERANCE, "float32": FP32_TOLERANCE}
        return all(difference < within[SIDES[side][1]] for side, difference in self.differences.items())


class Workload(NamedTuple):
    make: Callable[[], Ours | Opponent]
    records: Records
    windows: list[tuple[ViewBatch, list[NoisyRow]]]


def workload(name: str, size: Size, folder: Path, steps: int, more: int = 0) -> Workload:
    """A side by its name, and `steps` windows of the model and records that `prepare` wrote; they last for `more`."""
    kind, dtype = SIDES[name]
    keys = {"max_length": size.length, "packing": False, "per_device_train_batch_size": size.batch, "dtype": dtype}
    keys |= {"complementary": size.views > 1, "num_views": size.views}
    recipe = sft_recipe(folder / "model", folder / "records.jsonl", size.vocabulary, **keys)
    records = Records(recipe)
    batches = [records.source.next_window()[0] for _ in range(steps)]
    windows = [(batch, records.noisy_rows(batch) if kind is Opponent else []) for batch in batches]
    return Workload(functools.partial(kind, recipe), records, windows)


@contextlib.contextmanager
def prepare(size: Size, steps: int) -> Iterator[Path]:
    """A model and records for `steps`, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), size.vocabulary, size.shape)
        prompt = size.length // 2
        lengths = [Lengths(prompt, size.length - prompt)] * (size.batch * steps)
        write_records(Path(folder) / "records.jsonl", lengths, size.vocabulary)
        yield Path(folder)


def side(spec: dict[str, Any]) -> Callable[[int], float]:
    """A step of the side that `spec` names, by the number of the round."""
    work = workload(spec["name"], Size(*spec["size"]), Path(spec["folder"]), spec["steps"])
    made = work.make()
    return lambda number: made.step(*work.windows[number])


def memory(spec: dict[str, Any]) -> Memory:
    """Of the second step, after a small run that loads what any run loads."""
    for size in (SMOKE, Size(*spec["size"])):
        with prepare(size, 1) as folder:
            work = workload(spec["name"], size, folder, 1)
            measured = measure_memory(work.make, *work.windows[0])
        gc.collect()
    return measured


def time_steps(size: Size, steps: int, names: list[str], main: Path | None = None) -> Result:
    with prepare(size, steps + 1) as folder, contextlib.ExitStack() as others:
        spec = {"size": size, "folder": str(folder), "steps": steps + 1}
        calls = {}
        for name in names:
            if name in OF_MAIN:
                calls[name] = others.enter_context(Elsewhere("step", spec | {"name": name}, main))
            else:
                calls[name] = side(spec | {"name": name})
        return Result(interleave(calls, steps))


def memory_alone(name: str, size: Size, main: Path | None) -> Memory:
    """In a new process whose memory is returned when it is freed."""
    spec = {"name": name, "size": size}
    checkout = {"checkout": main} if name in OF_MAIN else {}
    with Elsewhere("step", spec, more=GIVES_BACK, **checkout) as process:
        return process.memory()


def profile(size: Size, steps: int) -> None:
    for name in ("fp32", "bf16"):
        with prepare(size, steps + 2) as folder:
            work = workload(name, size, folder, 0)
            result = profile_step(work.make(), work.records.source, steps)
        print(f"{size}, {name}, {torch.get_num_threads()} thread(s)", *result.lines(), sep="\n", end="\n\n")


def label(size: Size) -> str:
    views = "one view" if size.views == 1 else "a pair"
    return f"{size.shape}, L {size.length}, batch {size.batch}, V {size.vocabulary}, {views}"


def add_rows(table: Table, size: Size, result: Result, memories: dict[str, Memory]) -> None:
    for name, timed in result.timed.items():
        first = name == "opponent"
        table.add_row(
            label(size) if first else "",
            name,
            f"{timed.median:.2f} ({min(timed.seconds):.2f} - {max(timed.seconds):.2f})",
            f"{timed.cpu_median:.2f}",
            "" if first else f"{result.ratio(name):.2f} ({result.wall_ratio(name):.2f})",
            *([f"{value / 2**20:,.0f}" for value in memories[name]] if memories else ["", ""]),
            f"{timed.results[-1]:.6f}",
            "" if first else f"{result.difference(name):.1e}",
        )


def describe(size: Size, result: Result, memories: dict[str, Memory]) -> str:
    parts = [label(size)]
    if "bf16" in result.timed:
        faster = result.timed["fp32"].median / result.timed["bf16"].median
        parts.append(f"bf16 {faster:.2f} times as fast as fp32")
    if memories:
        share = memories["fp32"].above_parameters / memories["opponent"].above_parameters
        state_share = memories["fp32"].above_state / memories["opponent"].above_state
        parts.append(f"memory of fp32 {share:.3f} of the opponent's, above the state {state_share:.3f}")
    if not result.is_equal:
        parts.append(f"LOSSES DIFFER by more than {FP32_TOLERANCE:g} in fp32 or {BF16_TOLERANCE:g} in bf16")
    return "; ".join(parts)


def chosen_sides(options: argparse.Namespace) -> list[str]:
    left_out = set() if options.main else set(OF_MAIN)
    left_out |= set() if torch.cuda.is_available() else {"opponent bf16"}
    left_out |= {"main bf16", "bf16", "opponent bf16"} if options.fp32 else set()
    return [name for name in SIDES if name not in left_out]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, help="tokens of a document; one size instead of the table")
    parser.add_argument("--batch", type=int, default=4, help="documents (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the model (default: %(default)s)")
    parser.add_argument("--views", type=int, default=2, choices=(1, 2), help="2: a complementary pair (the default)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--fp32", action="store_true", help="without the sides in bfloat16")
    parser.add_argument("--main", type=Path, metavar="CHECKOUT", help="also time this checkout, in its own process")
    parser.add_argument("--no-memory", action="store_true", help="seconds and losses only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes, instead")
    parser.add_argument("--smoke", action="store_true", help="a size for tests, without memory")
    options = parser.parse_args(arguments)

    sizes, steps = ([SMOKE], SMOKE_STEPS) if options.smoke else (TABLE, options.steps)
    if options.length is not None:
        sizes = [Size(options.length, options.batch, options.vocabulary, options.shape, options.views)]
    if options.profile:
        for size in sizes:
            profile(size, steps)
        return 0
    console, rows, names = Console(width=140, highlight=False), [], chosen_sides(options)
    columns = ["size", "side", "s a step (range)", "CPU s", "opponent / this, CPU (clock)", "MiB above parameters"]
    columns += ["above state", "last loss", "difference"]
    table = Table(*columns, title=f"{torch.get_num_threads()} thread(s)")
    for size in sizes:
        with_memory = not (options.smoke or options.no_memory)
        memories = {name: memory_alone(name, size, options.main) for name in names} if with_memory else {}
        result = time_steps(size, steps, names, options.main)
        add_rows(table, size, result, memories)
        console.print(describe(size, result, memories))
        rows.append(row_of(label(size), result.timed, result.is_equal, result.differences, memories))
    console.print(table)
    write_rows(options.json, "step", rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
