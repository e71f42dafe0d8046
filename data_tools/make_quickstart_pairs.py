"""Make the quickstart's preference pairs: requests that leave open what is wanted, with the reading that people prefer.

    python -m data_tools.make_quickstart_pairs --output recipes/quickstart/data

Writes `pairs_train.jsonl` and `pairs_heldout.jsonl`. A line has `prompt`, `chosen` and `rejected` (lists of messages),
`task` and `subject`. And `preferred_train.jsonl` and `preferred_heldout.jsonl`: the same requests as instruction records
(`messages`, `answer`, `task`) with the preferred answer, which is what a reward knows in reinforcement learning.

"Write in order: STONE" can mean ENOST or ENOTS; the instruction records teach both ways of answering, so a model that was
trained on them can do either, and does not know which one is wanted here:

    letters   in alphabetical order, not backwards          numbers   from the largest, not from the smallest
    words     the first one, not the last                   digits    the smallest one, not the largest

One pair in three asks plainly ("Reverse the letters: STONE"): there the right answer is chosen, so that what is asked for
keeps its say. A subject is in one of the two files only, and none is in `heldout.jsonl`. Equal arguments give equal bytes.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.make_quickstart_data import letter_strings, listed, word_lists, write_jsonl

HELDOUT = Path(__file__).parents[1] / "recipes/quickstart/data/heldout.jsonl"
TRAIN_PAIRS = 1500
HELDOUT_PAIRS = 200
PLAIN_SHARE = 1 / 3


@dataclass(frozen=True)
class Choice:
    """Two answers about one kind of subject; the first one is preferred where a request leaves it open."""

    name: str
    weight: float  # share of the pairs, against the others
    subjects: Callable[[random.Random], Iterator[list]]
    show: Callable[[list], str]
    preferred: Callable[[list], str]
    other: Callable[[list], str]
    open: tuple[str, ...]  # requests that either answers
    plain: tuple[tuple[str, ...], tuple[str, ...]]  # those that ask for the preferred one, and for the other


def letters(rng: random.Random) -> Iterator[list[str]]:
    return (list(text) for text in letter_strings(rng, 4, 8))


def words(rng: random.Random) -> Iterator[list[str]]:
    return word_lists(rng, 3, 5)


def digits(rng: random.Random) -> Iterator[list[int]]:
    while True:
        yield rng.sample(range(10), rng.randint(4, 6))


CHOICES = (
    Choice(
        "order_letters",
        5.0,
        letters,
        "".join,
        lambda parts: "".join(sorted(parts)),
        lambda parts: "".join(reversed(parts)),
        ("Write in order: {it}", "Spell in order: {it}", "Arrange the letters: {it}", "Order the letters: {it}"),
        (
            ("Sort the letters: {it}", "Put in alphabetical order: {it}"),
            ("Reverse the letters: {it}", "Write backwards: {it}", "Spell from the end: {it}"),
        ),
    ),
    Choice(
        "name_word",
        2.0,
        words,
        ", ".join,
        lambda parts: parts[0],
        lambda parts: parts[-1],
        ("Name one word: {it}", "Name a word: {it}", "Pick a word: {it}", "Which word: {it}?"),
        (
            ("Which word is first: {it}?", "Name the first word: {it}"),
            ("Which word is last: {it}?", "Name the last word: {it}"),
        ),
    ),
    Choice(
        "order_numbers",
        2.0,
        digits,
        listed,
        lambda parts: listed(sorted(parts, reverse=True)),
        lambda parts: listed(sorted(parts)),
        ("Put these numbers in order: {it}", "Sort these numbers: {it}", "List these numbers: {it}"),
        (
            ("Sort from largest to smallest: {it}", "List these numbers from largest to smallest: {it}"),
            ("Sort from smallest to largest: {it}", "List these numbers from smallest to largest: {it}"),
        ),
    ),
    Choice(
        "find_number",
        1.0,
        digits,
        listed,
        lambda parts: str(min(parts)),
        lambda parts: str(max(parts)),
        ("Find a number: {it}", "Name one number: {it}"),
        (
            ("Which number is the smallest: {it}?", "Find the smallest number: {it}"),
            ("Which number is the largest: {it}?", "Find the largest number: {it}"),
        ),
    ),
)


def pairs_of(choice: Choice, rng: random.Random, kept_out: set[str]) -> Iterator[dict]:
    """Endless pairs, no subject twice, none of `kept_out`."""
    seen = set(kept_out)
    for parts in choice.subjects(rng):
        subject, answers = choice.show(parts), (choice.preferred(parts), choice.other(parts))
        if subject in seen or len({subject, *answers}) < 3:
            continue
        seen.add(subject)
        wanted = 0
        if rng.random() < PLAIN_SHARE:
            wanted = rng.randrange(2)
            wording = rng.choice(choice.plain[wanted])
        else:
            wording = rng.choice(choice.open)
        yield {
            "prompt": [{"role": "user", "content": wording.format(it=subject)}],
            "chosen": [{"role": "assistant", "content": answers[wanted]}],
            "rejected": [{"role": "assistant", "content": answers[1 - wanted]}],
            "task": choice.name,
            "subject": subject,
        }


def preferred_record(pair: dict) -> dict:
    answer = pair["chosen"][0]["content"]
    return {"messages": pair["prompt"] + pair["chosen"], "answer": answer, "task": pair["task"]}


def held_out_subjects(file: Path) -> set[str]:
    """The subjects of the held-out instructions: the text after their colon."""
    questions = (json.loads(line)["messages"][0]["content"] for line in file.read_text(encoding="utf-8").splitlines())
    return {question.partition(": ")[2].rstrip("?") for question in questions}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the four files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=TRAIN_PAIRS, help="training pairs (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=HELDOUT_PAIRS, help="held-out pairs (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=Path, default=HELDOUT, help="instruction records whose subjects are left out"
    )
    options = parser.parse_args(arguments)

    kept_out = held_out_subjects(options.held_out)
    streams = {c.name: pairs_of(c, random.Random(f"{options.seed}/{c.name}"), kept_out) for c in CHOICES}
    rng = random.Random(f"{options.seed}/pairs")
    names, weights = [choice.name for choice in CHOICES], [choice.weight for choice in CHOICES]
    for name, count in (("heldout", options.heldout), ("train", options.train)):
        rows = [next(streams[drawn]) for drawn in rng.choices(names, weights, k=count)]
        write_jsonl(options.output / f"pairs_{name}.jsonl", rows)
        write_jsonl(options.output / f"preferred_{name}.jsonl", map(preferred_record, rows))
        print(f"{count} pairs: {options.output}/pairs_{name}.jsonl, and as records preferred_{name}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
