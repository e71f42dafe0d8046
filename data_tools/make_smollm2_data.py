"""Make the records of recipes/smollm2: four tasks of reasoning-gym, with worked solutions.

    python -m data_tools.make_smollm2_data --output runs/smollm2/data --seed 0

| file | what | further columns |
|---|---|---|
| `train.jsonl` | records for training, half of them gsm_symbolic | `answer`, `task` |
| `heldout.jsonl` | records of each task, for `dfactory eval` | `answer`, `task` |
| `validation.jsonl` | records of each task, for evaluations in training and for choosing settings | `answer`, `task` |
| `preference_prompts.jsonl`, `preference_heldout.jsonl` | records for `dfactory data preferences` | `answer`, `task` |
| `rl_train.jsonl`, `rl_heldout.jsonl` | prompts of gsm_symbolic | what the reward `reasoning_gym` reads |

No question is in two files or twice in one. `answer` is reasoning-gym's. A response of gsm_symbolic, chain_sum and
time_intervals is a worked solution with the last line `The answer is ANSWER.`; a sorted list is the answer alone. Compare
them with `--answer-pattern 'The answer is (.+)\\.'`: text without a match is compared as a whole.

Left out and counted are questions seen before, those with noise of floating point such as 0.6666666666666666, negative
intervals, and those whose own answer is not what the solution gives: reasoning-gym drops the time of day of some date
formats, and rounds milliseconds down. Equal arguments give equal bytes, also on another day. Rows are written as they
are made.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TextIO

import reasoning_gym

from data_tools.worked import interval, running_sums

TRAIN_RECORDS = 24_000
HELDOUT_RECORDS = 200  # of each task
PREFERENCE_PROMPTS, PREFERENCE_HELDOUT = 1600, 200
RL_PROMPTS, RL_HELDOUT = 4000, 200
VALIDATION_RECORDS = 20  # of each task
CHUNK = 1000  # problems that reasoning-gym is asked for at once
LAST_LINE = "The answer is {}."
FLOAT_NOISE = re.compile(r"\d\.\d{4,}")
WHOLE = re.compile(r"(\d)\.0(?!\d)")  # 12.0 in a solution
UNITS = {"HH:MM": ("Hours", "Minutes"), "HH:MM:SS": ("Hours", "Minutes", "Seconds")}
UNITS |= {"HH:MM:SS.mmm": (*UNITS["HH:MM:SS"], "Milliseconds")}


class LeftOut(Exception):
    """Why a problem becomes no record."""


class Task(NamedTuple):
    """A task of reasoning-gym: its share of the training records, and the response to one of its problems."""

    name: str
    share: float
    response: Callable[[dict], str]
    scored_by: tuple[str, ...] = ()  # metadata that its scorer reads


def solved_gsm(entry: dict) -> str:
    """reasoning-gym's own solution. Its `#### n` becomes the last line."""
    solution = entry["metadata"]["answer_cot"].rpartition("\n####")[0].strip()
    if FLOAT_NOISE.search(entry["question"] + solution):
        raise LeftOut("noise of floating point")
    return WHOLE.sub(r"\1", solution) + "\n" + LAST_LINE.format(entry["answer"])


def sorted_words(entry: dict) -> str:
    return entry["answer"]


def summed(entry: dict) -> str:
    return f"{running_sums(entry['metadata']['expression'])}\n{LAST_LINE.format(entry['answer'])}"


def subtracted_times(entry: dict) -> str:
    told = entry["metadata"]
    start, end = (datetime.fromisoformat(told[name]) for name in ("start_time", "end_time"))
    if end < start:
        raise LeftOut("negative interval")
    form = told["expected_format"]
    days = form.startswith("D days")
    units = UNITS.get(form.removeprefix("D days").removeprefix(", "), ())
    precise = (
        UNITS["HH:MM:SS"] if units and start.second + end.second else units
    )  # seconds that no one asks for count too
    lines, values = interval(start, end, max(units, precise, key=len), days)
    if written(values[: len(units) + days], days) != entry["answer"] or (units and "(%A)" in told["format"]):
        raise LeftOut("wrong answer of reasoning-gym")
    return f"{lines}\n{LAST_LINE.format(entry['answer'])}"


def written(values: list[int], days: bool) -> str:
    """Days and units as reasoning-gym writes an interval.

    written([2, 3, 4], days=True) == "2 days, 03:04"; written([3, 4, 5, 6], days=False) == "03:04:05.006"
    """
    clock = values[1:] if days else values
    text = ":".join(f"{value:02d}" for value in clock[:3]) + "".join(f".{value:03d}" for value in clock[3:])
    return ", ".join(filter(None, (f"{values[0]} days" if days else "", text)))


GSM = Task("gsm_symbolic", 0.5, solved_gsm)
TASKS = (
    GSM,
    Task("word_sorting", 1 / 6, sorted_words, ("sorted_words",)),
    Task("chain_sum", 1 / 6, summed),
    Task("time_intervals", 1 / 6, subtracted_times, ("task_type",)),
)


class Problems:
    """Endless records of one task, all different."""

    def __init__(self, task: Task, seed: int):
        self.task, self.left_out = task, Counter()
        self._rng = random.Random(f"{seed}/{task.name}")
        self._seen: set[bytes] = set()

    def __iter__(self) -> Iterator[dict]:
        while True:
            for entry in reasoning_gym.create_dataset(self.task.name, seed=self._rng.randrange(2**31), size=CHUNK):
                try:
                    self._refuse_seen(entry["question"])
                    yield self._record(entry)
                except LeftOut as reason:
                    self.left_out[str(reason)] += 1

    def _refuse_seen(self, question: str) -> None:
        digest = hashlib.sha256(" ".join(question.split()).encode()).digest()[:16]
        if digest in self._seen:
            raise LeftOut("question seen before")
        self._seen.add(digest)

    def _record(self, entry: dict) -> dict:
        question = {"role": "user", "content": entry["question"].strip()}
        messages = [question, {"role": "assistant", "content": self.task.response(entry)}]
        told = {name: entry["metadata"][name] for name in ("source_dataset", *self.task.scored_by)}
        return {"messages": messages, "answer": entry["answer"], "task": self.task.name, "metadata": told}


def training_record(record: dict) -> dict:
    return {name: record[name] for name in ("messages", "answer", "task")}


def prompt(record: dict) -> dict:
    """The question alone, with what rewards read."""
    question = record["messages"][:1]
    return record | {"messages": question, "question": question[0]["content"]}


def shares(total: int) -> list[Task]:
    """The task of each of `total` records, in the proportion of the shares, adding up exactly."""
    counts = [int(total * task.share) for task in TASKS]
    for index in itertools.islice(itertools.cycle(range(len(TASKS))), total - sum(counts)):
        counts[index] += 1
    return [task for task, count in zip(TASKS, counts, strict=True) for _ in range(count)]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        yield file
    partial.replace(path)


def write(path: Path, order: list[Task], streams: dict[Task, Iterator[dict]], row: Callable[[dict], dict]) -> None:
    with replacing(path) as file:
        for task in order:
            file.write(json.dumps(row(next(streams[task])), ensure_ascii=False) + "\n")
    print(f"{len(order):,} rows: {path}")


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    problems = {task: Problems(task, options.seed) for task in TASKS}
    streams = {task: iter(one) for task, one in problems.items()}
    draws = random.Random(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    files = [  # what is held out comes first, so that it does not depend on how much is trained on
        ("heldout", list(TASKS) * options.heldout, training_record),
        ("rl_heldout", [GSM] * options.rl_heldout, prompt),
        ("preference_heldout", shares(options.preference_heldout), training_record),
        ("rl_train", [GSM] * options.rl_prompts, prompt),
        ("preference_prompts", shares(options.preference_prompts), training_record),
        ("validation", list(TASKS) * options.validation, training_record),
        ("train", shares(options.train), training_record),
    ]
    for name, order, row in files:
        draws.shuffle(order)
        write(options.output / f"{name}.jsonl", order, streams, row)
    for task, one in problems.items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(one.left_out.items()))
        print(f"{task.name}: left out {reasons or 'none'}")
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder, made if missing")
    parser.add_argument("--seed", type=int, default=0)
    for name, default, what in (
        ("train", TRAIN_RECORDS, "records of train.jsonl"),
        ("heldout", HELDOUT_RECORDS, "records of heldout.jsonl, of each task"),
        ("validation", VALIDATION_RECORDS, "records of validation.jsonl, of each task"),
        ("preference-prompts", PREFERENCE_PROMPTS, "records for preference pairs"),
        ("preference-heldout", PREFERENCE_HELDOUT, "records for held-out pairs"),
        ("rl-prompts", RL_PROMPTS, "prompts of gsm_symbolic for RL"),
        ("rl-heldout", RL_HELDOUT, "held-out ones"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
