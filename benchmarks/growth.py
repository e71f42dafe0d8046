"""How the cost of a training step grows: with length, views, batch, experts and ranks, one axis at a time.

    python -m benchmarks.growth                             # the tables of benchmarks/LOG.md
    python -m benchmarks.growth --axes length views         # some of them
    python -m benchmarks.growth --axes ranks --ranks 1 2 4  # on a machine with more cores
    python -m benchmarks.growth --axes length --length 512 1024 2048 --shape mini   # layers of LLaDA2-mini's own width

By default glibc returns tensors above 32 MB at once and allocates them again, which is expensive in wide layers. To measure
without that put `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456` before the command. A
GPU's allocator keeps memory by itself.

A step is forward, backward, clipping and AdamW in fp32, as in benchmarks/step.py; half of each document is prompt, and views
cover the other half. All axes begin at L 1024, batch 2, two views and 32 experts, of which a token takes 4 (of `mini` 8).
The points of an axis take turns, a step each on new documents, and the first step of each is not timed. The exponent is the
slope of log seconds over log size by least squares: 1 is linear, 0 is free. On ranks (gloo, ZeRO 0, a process each under
torchrun) every rank has as large a batch and as many threads, so that 0 would be perfect: the threads of this process,
divided by the largest number of ranks.

Operations (planning/costs.py, by visible pairs) are printed next to the seconds: where they grow faster than positions, so
does a perfect step. A step is called linear in tokens up to L 2048 if its seconds a position differ by at most 15 percent
there.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Timed, interleave
from benchmarks.workload import (
    BLOCK,
    SHAPES,
    Lengths,
    Ours,
    Records,
    sft_recipe,
    write_model,
    write_records,
)
from dfactory import distributed
from dfactory.models.registry import read_config
from dfactory.planning.costs import Row, Work, forward_flops, step_flops
from dfactory.types import PADDING, ViewBatch

ROOT = Path(__file__).resolve().parents[1]
LINEAR_UP_TO, LINEAR_WITHIN = 2048, 0.15  # tokens; of seconds a position


@dataclasses.dataclass(frozen=True)
class Point:
    """What one row of a table runs."""

    length: int = 1024  # tokens of a document
    views: int = 2
    batch: int = 2  # documents a rank
    experts: int = 32
    ranks: int = 1
    vocabulary: int = 8192
    shape: str = "small"  # of workload.SHAPES


AXES = {
    "length": (512, 1024, 2048, 4096, 8192),
    "views": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8),
    "experts": (8, 16, 32, 64),
    "ranks": (1, 2),
}
SMOKE_BASE = Point(length=128, vocabulary=512)
SMOKE_AXES = {"length": (64, 128), "views": (1, 2), "batch": (1, 2), "experts": (8, 16), "ranks": (1, 2)}
SMOKE_STEPS = 1


class Cost(NamedTuple):
    """Of one point: medians of a step."""

    seconds: float
    spread: tuple[float, float]
    positions: int  # of rows on all ranks, padding not counted
    flops: float  # of matrix products, attention by visible pairs, on all ranks; dfactory/planning/costs.py
    loss: float  # of the last step


def fitted_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of seconds = c * size ** p, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def unevenness(costs: dict[int, Cost]) -> float:
    """How much more the dearest position takes than the cheapest, as a share."""
    a_position = [cost.seconds / cost.positions for cost in costs.values()]
    return max(a_position) / min(a_position) - 1


class Runner:
    """The step of one point in this process, and windows enough for all its rounds."""

    def __init__(self, point: Point, side: Ours, model_dir: Path, steps: int):
        rank, world_size = distributed.start()
        recipe = point_recipe(point, model_dir, steps)
        source = Records(recipe, rank, world_size).source
        self.side, self.batches = side, [source.next_window()[0] for _ in range(steps)]
        self.positions = positions_of(self.batches[0]) * world_size
        row = Row(document=point.length, prompt=point.length // 2, views=point.views, block=BLOCK)
        targets = len(self.batches[0].target_ids_N)
        target_pairs = targets * row.view_pairs // (row.document - row.prompt)  # targets are spread evenly
        work = Work(self.positions // world_size, point.batch * row.document_pairs, targets, target_pairs)
        forward = forward_flops(read_config(model_dir), work)
        self.flops = world_size * sum(step_flops(forward, checkpointing=False).values())

    def step(self, number: int) -> float:
        return self.side.step(self.batches[number], None)

    def cost(self, timed: Timed) -> Cost:
        spread = min(timed.seconds), max(timed.seconds)
        return Cost(timed.median, spread, self.positions, self.flops, timed.results[-1])


def positions_of(batch: ViewBatch) -> int:
    return int((batch.place_RS.document != PADDING).sum())


def point_recipe(point: Point, model_dir: Path, steps: int):
    """The recipe of a point; its records are written beside the model."""
    file = model_dir.parent / f"{'-'.join(map(str, dataclasses.astuple(point)))}.jsonl"
    if not file.exists():
        lengths = [Lengths(point.length // 2, point.length - point.length // 2)] * (point.batch * point.ranks * steps)
        write_records(file, lengths, point.vocabulary)
    keys = {"max_length": point.length, "packing": False, "per_device_train_batch_size": point.batch}
    return sft_recipe(model_dir, file, point.vocabulary, complementary=False, num_views=point.views, **keys)


def measure(points: dict[int, Point], folder: Path, rounds: int) -> dict[int, Cost]:
    """Points of one axis that run in this process; those with the same model share it and its optimiser."""
    sides: dict[int, tuple[Ours, Path]] = {}
    runners = {}
    for size, point in points.items():
        if point.experts not in sides:
            at = folder / f"experts-{point.experts}"
            at.mkdir(exist_ok=True)
            model_dir = write_model(at, point.vocabulary, point.shape, num_experts=point.experts)
            sides[point.experts] = (Ours(point_recipe(point, model_dir, rounds + 1)), model_dir)
        runners[size] = Runner(point, *sides[point.experts], rounds + 1)
    timed = interleave({str(size): runner.step for size, runner in runners.items()}, rounds)
    return {size: runner.cost(timed[str(size)]) for size, runner in runners.items()}


def measure_ranks(points: dict[int, Point], folder: Path, rounds: int) -> dict[int, Cost]:
    """Each number of ranks in processes of its own, under torchrun; rank 0 writes what it measured."""
    first = next(iter(points.values()))
    model_dir = write_model(folder, first.vocabulary, first.shape, num_experts=first.experts)
    threads = str(max(1, torch.get_num_threads() // max(points)))  # of a rank, the same at every number of them
    costs = {}
    for ranks, point in points.items():
        point_recipe(point, model_dir, rounds + 1)  # so that the ranks find the records written
        output = folder / f"ranks-{ranks}.json"
        job = {"point": dataclasses.asdict(point), "rounds": rounds, "model": str(model_dir), "output": str(output)}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, "-m", "benchmarks.growth", "--rank-job", json.dumps(job)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads})
        costs[ranks] = Cost(*json.loads(output.read_text()))
    return costs


def run_rank(job: dict) -> None:
    """One rank's part of `measure_ranks`."""
    rank, _ = distributed.start()
    point, rounds, model_dir = Point(**job["point"]), job["rounds"], Path(job["model"])
    side = Ours(point_recipe(point, model_dir, rounds + 1))
    runner = Runner(point, side, model_dir, rounds + 1)
    cost = runner.cost(interleave({"step": runner.step}, rounds)["step"])
    if rank == 0:
        Path(job["output"]).write_text(json.dumps(cost))
    distributed.leave_at_exit()


def axis_table(axis: str, costs: dict[int, Cost]) -> Table:
    columns = ("positions", "GFLOP", "s a step (range)", "us a position", "GFLOP/s", "loss")
    table = Table(axis, *columns, title=f"growth with {axis}")
    for column in table.columns:
        column.justify = "right"
    for size, cost in costs.items():
        a_position, rate = f"{1e6 * cost.seconds / cost.positions:.1f}", f"{cost.flops / cost.seconds / 1e9:.1f}"
        work = f"{cost.flops / 1e9:,.0f}"
        spread = f"{cost.seconds:.3f} ({cost.spread[0]:.3f} - {cost.spread[1]:.3f})"
        table.add_row(f"{size}", f"{cost.positions:,}", work, spread, a_position, rate, f"{cost.loss:.4f}")
    return table


def verdicts(axis: str, costs: dict[int, Cost]) -> list[str]:
    """The fitted exponent, and for lengths whether they are linear."""
    if len(costs) < 2:
        return []
    seconds = [cost.seconds for cost in costs.values()]
    lines = [f"{axis}: exponent {fitted_exponent(list(costs), seconds):.2f}"]
    positions = [cost.positions for cost in costs.values()]
    if len(set(positions)) > 1:
        flops = [cost.flops for cost in costs.values()]
        lines[0] += f"; over positions {fitted_exponent(positions, seconds):.2f}, operations over positions "
        lines[0] += f"{fitted_exponent(positions, flops):.2f}"
    short = {size: cost for size, cost in costs.items() if size <= LINEAR_UP_TO}
    if axis == "length" and len(short) > 1:
        share = unevenness(short)
        is_linear = "linear" if share <= LINEAR_WITHIN else "NOT linear"
        upper = f"up to L {max(short)} seconds a position differ by {share:.0%}"
        lines.append(f"{upper}: {is_linear} in tokens within {LINEAR_WITHIN:.0%}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES, help="(default: all)")
    for axis, sizes in AXES.items():
        text = f"sizes of this axis (default: {' '.join(map(str, sizes))})"
        parser.add_argument(f"--{axis}", nargs="+", type=int, metavar="N", help=text)
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each point (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="two small sizes an axis, one step each, for tests")
    parser.add_argument("--rank-job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_job is not None:
        run_rank(options.rank_job)
        return 0

    base, axes = (SMOKE_BASE, SMOKE_AXES) if options.smoke else (Point(), AXES)
    base = dataclasses.replace(base, shape=options.shape)
    fewest = 2 * SHAPES[options.shape]["n_group"]  # the router takes a group's two best
    if "experts" in options.axes and min(options.experts or axes["experts"]) < fewest:
        parser.error(
            f"--shape {options.shape} takes {fewest} experts at least: give --experts {fewest} ... or other --axes"
        )
    rounds = SMOKE_STEPS if options.smoke else options.rounds
    console = Console(width=110, highlight=False)
    console.print(f"{base}, {torch.get_num_threads()} thread(s), {rounds} timed step(s) a point")
    for axis in options.axes:
        sizes = vars(options)[axis] or axes[axis]
        points = {size: dataclasses.replace(base, **{axis: size}) for size in sizes}
        with tempfile.TemporaryDirectory() as folder:
            costs = (measure_ranks if axis == "ranks" else measure)(points, Path(folder), rounds)
        console.print(axis_table(axis, costs), *verdicts(axis, costs), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
