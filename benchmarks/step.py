"""A training step beside the obvious one: seconds, peak memory and loss of both, in one run.

    python -m benchmarks.step                                             # the table of benchmarks/LOG.md
    python -m benchmarks.step --length 1024 --batch 4 --vocabulary 8192   # one size

A step is forward, backward, clipping and AdamW on `batch` documents of `length` tokens, half of them prompt, with a
complementary pair of views in blocks of 32. The obvious version (tests/reference.py) runs noisy ++ clean rows of twice
the length once a view, with a dense float mask, a loop over experts, and fp32 logits at all positions; its views' graphs
do not live at the same time. Sides take turns, a step each; the first step of each is not timed. Losses are compared over
all steps, so that gradients and updates are too. Memory is measured before, each side alone in memory.
"""

import argparse
import functools
import gc
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.workload import (
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

FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 2e-2  # of a loss, relative to the obvious version's
SIDES = {"obvious": (Obvious, "float32"), "fp32": (Ours, "float32"), "bf16": (Ours, "bfloat16")}


class Size(NamedTuple):
    length: int
    batch: int
    vocabulary: int


TABLE = [Size(1024, 4, 8192), Size(2048, 2, 8192), Size(512, 2, 157184)]
SMOKE = [Size(128, 2, 512)]


class Result(NamedTuple):
    timed: dict[str, Timed]
    memory: dict[str, Memory]

    def ratio(self, slow: str, fast: str) -> float:
        return self.timed[slow].median / self.timed[fast].median

    def difference(self, side: str) -> float:
        return largest_difference(self.timed[side].results, self.timed["obvious"].results)

    @property
    def is_equal(self) -> bool:
        return self.difference("fp32") < FP32_TOLERANCE and self.difference("bf16") < BF16_TOLERANCE


def measure(size: Size, steps: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder), size.vocabulary)
        prompt = size.length // 2
        lengths = [Lengths(prompt, size.length - prompt)] * (size.batch * (steps + 1))
        records = write_records(Path(folder) / "records.jsonl", lengths, size.vocabulary)
        keys = {"max_length": size.length, "packing": False, "per_device_train_batch_size": size.batch}
        makers = {
            name: functools.partial(kind, sft_recipe(model_dir, records, size.vocabulary, dtype=dtype, **keys))
            for name, (kind, dtype) in SIDES.items()
        }
        source = Records(sft_recipe(model_dir, records, size.vocabulary, **keys))
        batches = [source.source.next_window()[0] for _ in range(steps + 1)]
        given = [(batch, source.padded(batch)) for batch in batches]

        memory = {}
        for name in reversed(SIDES):  # what malloc keeps of an earlier side can only flatter the obvious one
            memory[name] = measure_memory(makers[name], *given[0])
            gc.collect()
        sides = {name: make() for name, make in makers.items()}
        calls = {name: lambda number, side=side: side.step(*given[number]) for name, side in sides.items()}
        return Result(interleave(calls, steps), memory)


def add_rows(table: Table, size: Size, result: Result) -> None:
    for name in SIDES:
        timed, memory = result.timed[name], result.memory[name]
        first = name == "obvious"
        table.add_row(
            f"L {size.length}, batch {size.batch}, V {size.vocabulary}" if first else "",
            name,
            f"{timed.median:.2f}",
            f"{min(timed.seconds):.2f} - {max(timed.seconds):.2f}",
            "" if first else f"{result.ratio('obvious', name):.1f}",
            f"{memory.above_parameters / 2**20:,.0f}",
            f"{memory.above_state / 2**20:,.0f}",
            f"{timed.results[0]:.6f}",
            f"{timed.results[-1]:.6f}",
            "" if first else f"{result.difference(name):.1e}",
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, help="tokens of a document; one size instead of the table")
    parser.add_argument("--batch", type=int, default=4, help="documents (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a size for tests")
    options = parser.parse_args(arguments)

    sizes = SMOKE if options.smoke else TABLE
    if options.length is not None:
        sizes = [Size(options.length, options.batch, options.vocabulary)]
    console, equal = Console(width=150, highlight=False), True
    columns = ["size", "side", "s a step", "range", "obvious / this", "MiB above parameters", "MiB above state"]
    table = Table(
        *columns, "first loss", "last loss", "largest difference", title=f"{torch.get_num_threads()} thread(s)"
    )
    for size in sizes:
        result = measure(size, options.steps)
        add_rows(table, size, result)
        memory = result.memory["fp32"].above_parameters / result.memory["obvious"].above_parameters
        console.print(f"{size}: memory {memory:.2f} of the obvious; bf16 {result.ratio('fp32', 'bf16'):.2f} x fp32")
        equal = equal and result.is_equal
    console.print(table)
    if not equal:
        console.print(f"losses differ by more than {FP32_TOLERANCE:g} in fp32 or {BF16_TOLERANCE:g} in bf16")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
