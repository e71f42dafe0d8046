"""Print what a quickstart run changed: loss, and held-out exact match and tokens per forward before and after.

    python -m data_tools.quickstart_table RUN_DIR

Reads from RUN_DIR `metrics.jsonl` (a training step has `loss`) and the outputs of `dfactory generate` on the held-out
records: `before.jsonl` of the base model, `after.jsonl` of the trained one. An answer matches when `text`, without
space around it, equals `answer`.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

LOSS_STEPS = 10  # steps that the first and the last loss are averaged over


def read_jsonl(path: Path, needed: tuple[str, ...] = ()) -> list[dict]:
    """The objects of a JSONL file. Ends the program, naming file and line, where one is missing or lacks a field."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: give the folder of a finished quickstart run")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        missing = [field for field in needed if field not in row]
        if missing:
            raise SystemExit(f"{path}:{number} has no {', '.join(missing)}: it must be an output of dfactory generate")
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path} is empty: the run that should have filled it did not finish")
    return rows


def first_and_last_loss(rows: list[dict]) -> tuple[float, float]:
    losses = [row["loss"] for row in rows if "loss" in row]
    if not losses:
        raise SystemExit("metrics.jsonl holds no `loss`: the run stopped before its first step")
    first, last = losses[:LOSS_STEPS], losses[-LOSS_STEPS:]
    return sum(first) / len(first), sum(last) / len(last)


def matches(rows: list[dict]) -> dict[str, list[bool]]:
    """Whether each answer matches, by task."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["text"].strip() == row["answer"])
    return dict(by_task)


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def tokens_per_forward(rows: list[dict]) -> float:
    return sum(len(row["output_ids"]) for row in rows) / max(sum(row["forwards"] for row in rows), 1)


def table(run: Path) -> Table:
    needed = ("text", "answer", "task", "forwards", "output_ids")
    before, after = (read_jsonl(run / f"{name}.jsonl", needed) for name in ("before", "after"))
    first_loss, last_loss = first_and_last_loss(read_jsonl(run / "metrics.jsonl"))
    hits_before, hits_after = matches(before), matches(after)

    shown = Table("", "before", "after", title=f"{len(after)} held-out prompts")
    for column in shown.columns[1:]:
        column.justify = "right"
    shown.add_row("training loss", f"{first_loss:.3f}", f"{last_loss:.3f}")
    shown.add_row("tokens per forward", f"{tokens_per_forward(before):.2f}", f"{tokens_per_forward(after):.2f}")
    every_before, every_after = ([hit for hits in by.values() for hit in hits] for by in (hits_before, hits_after))
    shown.add_row(
        "exact match", f"{share(every_before):.1%}", f"{share(every_after):.1%}", style="bold", end_section=True
    )
    for task in sorted(hits_after):
        shown.add_row(f"  {task}", f"{share(hits_before.get(task, [False])):.0%}", f"{share(hits_after[task]):.0%}")
    return shown


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output_dir of the quickstart")
    run = parser.parse_args(arguments).run
    console = Console()
    console.print(table(run))
    console.print(f"report: {run / 'report'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
