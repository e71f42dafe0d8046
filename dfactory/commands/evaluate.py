"""`dfactory eval`: exact match on records with an `answer`, with its confidence interval, and tokens per forward."""

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dfactory.commands.generate import Answerer, matches, write_outputs
from dfactory.config.decode import DecodeKeys
from dfactory.data.prompts import read_rows
from dfactory.errors import DataError

NORMAL_QUANTILE = 1.96  # two-sided 95 percent


def evaluate(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    console = Console(highlight=False)
    rows = read_rows(arguments.data)
    for row in rows:
        if not isinstance(row.fields.get("answer"), str):
            raise DataError(f"{row.origin} has no text under `answer` to compare the response with")
    answerer = Answerer(arguments, keys)
    started = time.perf_counter()
    outputs = [answerer.output(row, rollout) for row, rollout in answerer.answer(rows, console)]
    seconds = time.perf_counter() - started
    if arguments.output:
        write_outputs(Path(arguments.output), outputs)
    console.print(summary(outputs, seconds))
    return 0


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 percent confidence interval of a share, after Wilson: sane near 0 and 1 and for few records."""
    z2 = NORMAL_QUANTILE**2
    centre = (hits + z2 / 2) / (count + z2)
    half = NORMAL_QUANTILE * math.sqrt(hits * (count - hits) / count + z2 / 4) / (count + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(outputs: list[dict], seconds: float) -> Table:
    table = Table("", "records", "exact match", "95% interval", "tokens/forward", title="evaluation")
    for column in table.columns[1:]:
        column.justify = "right"
    by_task = defaultdict(list)
    for output in outputs:
        by_task[str(output.get("task", ""))].append(output)
    if len(by_task) > 1:
        for task in sorted(by_task):
            table.add_row(*_row(task, by_task[task]))
        table.add_section()
    table.add_row(*_row("all", outputs), style="bold")
    tokens = sum(len(output["output_ids"]) for output in outputs)
    table.caption = f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} per second"
    return table


def _row(name: str, outputs: list[dict]) -> list[str]:
    hits = sum(matches(output) for output in outputs)
    low, high = wilson_interval(hits, len(outputs))
    forwards = sum(output["forwards"] for output in outputs)
    tokens = sum(len(output["output_ids"]) for output in outputs)
    share = f"{hits / len(outputs):.1%}"
    return [name, str(len(outputs)), share, f"{low:.1%} .. {high:.1%}", f"{tokens / max(forwards, 1):.2f}"]
