"""Make the quickstart's records: short instructions about letters, words and numbers, each with one right answer.

    python -m data_tools.make_quickstart_data --output recipes/quickstart/data

Writes `train.jsonl` and `heldout.jsonl`. A line has `messages` (user, assistant), `answer` (the assistant's text alone),
`task`, and `subject` (what the instruction is about). A subject of a task is in one of the two files only, whatever the
wording. Equal arguments give equal bytes.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from data_tools.quickstart_tasks import TASKS, Problem, Task, shares

TRAIN_RECORDS = 6000
HELDOUT_RECORDS = 300
MAX_MISSES = 1000  # draws in a row that bring nothing new: the task is exhausted


def records_of(task: Task, train: int, heldout: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Records of one task. Held-out subjects are set aside first, so nothing of them is ever trained on.

    When a task has fewer problems than records, the others come again in another wording.
    """
    rng = random.Random(f"{seed}/{task.name}")
    problems = distinct(task, train + heldout, rng)
    kept_subjects = {problem.subject for problem in problems[:heldout]}
    kept = [record(task, problem, rng.choice(task.wordings)) for problem in problems[:heldout]]
    others = [problem for problem in problems[heldout:] if problem.subject not in kept_subjects]
    first = [rng.randrange(len(task.wordings)) for _ in others]
    trained = [
        record(task, problem, task.wordings[(start + turn) % len(task.wordings)])
        for turn in range(len(task.wordings))
        for problem, start in zip(others, first, strict=True)
    ]
    if len(kept) < heldout or len(trained) < train:
        raise SystemExit(
            f"task {task.name} has {len(problems)} problems in {len(task.wordings)} wordings: "
            f"{train} training and {heldout} held-out records cannot be made; ask for fewer or lower its weight"
        )
    return trained[:train], kept


def distinct(task: Task, count: int, rng: random.Random) -> list[Problem]:
    """`count` different problems and some to spare, or as many as there are."""
    found: dict[Problem, None] = {}
    misses = 0
    for problem in task.problems(rng):
        misses = misses + 1 if problem in found else 0
        found.setdefault(problem)
        if len(found) >= count + count // 10 or misses > MAX_MISSES:
            return list(found)
    raise AssertionError("problems do not end")


def record(task: Task, problem: Problem, wording: str) -> dict:
    question = wording.format(it=problem.subject, how=problem.how)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": problem.answer}]
    return {"messages": messages, "answer": problem.answer, "task": task.name, "subject": problem.subject}


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=TRAIN_RECORDS, help="training records (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=HELDOUT_RECORDS, help="held-out records (default: %(default)s)")
    options = parser.parse_args(arguments)

    weights = {task.name: task.weight for task in TASKS}
    train_shares, heldout_shares = shares(options.train, weights), shares(options.heldout, weights)
    train, heldout = [], []
    for task in TASKS:
        trained, kept = records_of(task, train_shares[task.name], heldout_shares[task.name], options.seed)
        train += trained
        heldout += kept
    random.Random(options.seed).shuffle(train)
    write_jsonl(options.output / "train.jsonl", train)
    write_jsonl(options.output / "heldout.jsonl", heldout)
    print(f"{len(train)} training and {len(heldout)} held-out records of {len(TASKS)} tasks in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
