"""Make the quickstart's records: short instructions about letters, words, numbers and weekdays, each with one answer.

    python -m data_tools.make_quickstart_data --output recipes/quickstart/data

Writes `train.jsonl` and `heldout.jsonl`. A line has `messages` (user, assistant), `answer` (the assistant's text alone)
and `task`. Words and some of the problems come from reasoning-gym (its word source is a public domain story), the rest
is drawn here. A problem, whatever its wording, is in one of the two files only. Equal arguments give equal bytes.

What the model has to take apart is written in capitals and digits, each of which is one token of the embedded model,
wherever it stands.
"""

import argparse
import itertools
import json
import random
import re
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import reasoning_gym
from reasoning_gym.data import read_data_file

TRAIN_RECORDS = 6000
HELDOUT_RECORDS = 200

WORD_BANK = (
    *(
        "apple",
        "bread",
        "cheese",
        "lemon",
        "rice",
        "bear",
        "cat",
        "dog",
        "fish",
        "horse",
        "blue",
        "green",
        "red",
        "white",
    ),
    *("book", "chair", "door", "table", "cloud", "river", "snow", "star", "sun", "tree"),
)
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

Problem = tuple[dict[str, object], str]  # the fields of the instruction, and the answer


@dataclass(frozen=True)
class Task:
    name: str
    weight: float  # share of the records, against the other tasks
    wordings: tuple[str, ...]
    problems: Callable[[random.Random], Iterator[Problem]]  # may repeat itself and may end


def letter_strings(rng: random.Random, shortest: int, longest: int) -> Iterator[str]:
    """Capitals: words of the story that reasoning-gym carries and random letters, in turn."""
    story = read_data_file("in_the_year_2889.txt")
    words = sorted(set(re.findall(rf"\b[a-z]{{{shortest},{longest}}}\b", story)))
    while True:
        yield rng.choice(words).upper()
        yield "".join(rng.choices(string.ascii_uppercase, k=rng.randint(shortest, longest)))


def gym(name: str, rng: random.Random, **settings) -> Iterator[dict]:
    """Endless problems of a reasoning-gym dataset, seeded from `rng`."""
    while True:
        yield from reasoning_gym.create_dataset(name, seed=rng.randrange(2**31), size=500, **settings)


def letter_problems(
    change: Callable[[str], str], shortest: int, longest: int
) -> Callable[[random.Random], Iterator[Problem]]:
    """Problems that make another string of a string of letters."""

    def problems(rng: random.Random) -> Iterator[Problem]:
        for letters in letter_strings(rng, shortest, longest):
            yield {"letters": letters}, change(letters)

    return problems


def alphabet_problems(rng: random.Random) -> Iterator[Problem]:
    """Every run of 5 to 16 letters of the alphabet, once up and once down."""
    problems = []
    for alphabet in (string.ascii_uppercase, string.ascii_uppercase[::-1]):
        for start, length in itertools.product(range(len(alphabet)), range(5, 17)):
            run = alphabet[start : start + length]
            if len(run) == length:
                problems.append(({"first": run[0], "last": run[-1]}, run))
    rng.shuffle(problems)
    yield from problems


def word_lists(rng: random.Random, shortest: int, longest: int) -> Iterator[list[str]]:
    while True:
        yield rng.sample(WORD_BANK, rng.randint(shortest, longest))


def pick_word_problems(rng: random.Random) -> Iterator[Problem]:
    places = {"first": 0, "second": 1, "last": -1}
    for words in word_lists(rng, 3, 5):
        place = rng.choice(list(places))
        yield {"place": place, "words": ", ".join(words)}, words[places[place]]


def reverse_words_problems(rng: random.Random) -> Iterator[Problem]:
    for words in word_lists(rng, 4, 6):
        yield {"words": ", ".join(words)}, ", ".join(reversed(words))


def whole_numbers(texts: list[str]) -> list[int]:
    return [int(float(text)) for text in texts]


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def sort_numbers_problems(rng: random.Random) -> Iterator[Problem]:
    settings = {"min_numbers": 5, "max_numbers": 9, "max_decimals": 0, "min_value": 0, "max_value": 9}
    orders = {"ascending": "smallest to largest", "descending": "largest to smallest"}
    for entry in gym("number_sorting", rng, **settings):
        told = entry["metadata"]
        fields = {"numbers": listed(whole_numbers(told["original_numbers"])), "order": orders[told["direction"]]}
        yield fields, listed(whole_numbers(told["sorted_numbers"]))


def extreme_number_problems(rng: random.Random) -> Iterator[Problem]:
    extremes = {"largest": max, "smallest": min}
    while True:
        numbers = rng.sample(range(10), rng.randint(3, 6))
        which = rng.choice(list(extremes))
        yield {"which": which, "numbers": listed(numbers)}, str(extremes[which](numbers))


def sum_problems(rng: random.Random) -> Iterator[Problem]:
    """Every sum of two digits, once."""
    problems = [({"left": left, "right": right}, str(left + right)) for left in range(10) for right in range(10)]
    rng.shuffle(problems)
    yield from problems


def weekday_problems(rng: random.Random) -> Iterator[Problem]:
    """Every weekday, 1 to 6 days away, both ways."""
    problems = []
    for (index, day), distance, side in itertools.product(enumerate(WEEKDAYS), range(1, 7), ("after", "before")):
        shift = distance if side == "after" else -distance
        span = f"{distance} day" if distance == 1 else f"{distance} days"
        problems.append(({"span": span, "side": side, "day": day}, WEEKDAYS[(index + shift) % 7]))
    rng.shuffle(problems)
    yield from problems


def parity_problems(rng: random.Random) -> Iterator[Problem]:
    numbers = list(range(1000))
    rng.shuffle(numbers)
    yield from (({"number": number}, "odd" if number % 2 else "even") for number in numbers)


TASKS = (
    Task(
        "reverse_letters",
        1.2,
        ("Reverse the letters: {letters}", "Write backwards: {letters}", "Spell from the end: {letters}"),
        letter_problems(lambda letters: letters[::-1], 5, 12),
    ),
    Task(
        "sort_letters",
        1.5,
        ("Sort the letters: {letters}", "Put in alphabetical order: {letters}"),
        letter_problems(lambda letters: "".join(sorted(letters)), 5, 12),
    ),
    Task(
        "double_letters",
        0.8,
        ("Write every letter twice: {letters}", "Double the letters: {letters}"),
        letter_problems(lambda letters: "".join(letter * 2 for letter in letters), 5, 8),
    ),
    Task(
        "alphabet",
        0.8,
        ("Write the letters from {first} to {last}", "Spell the alphabet from {first} to {last}"),
        alphabet_problems,
    ),
    Task(
        "pick_word",
        0.4,
        ("Which word is {place}: {words}?", "Name the {place} word: {words}"),
        pick_word_problems,
    ),
    Task(
        "reverse_words",
        0.8,
        ("Reverse the list: {words}", "List these from last to first: {words}"),
        reverse_words_problems,
    ),
    Task(
        "sort_numbers",
        1.2,
        ("Sort from {order}: {numbers}", "List these numbers from {order}: {numbers}"),
        sort_numbers_problems,
    ),
    Task(
        "extreme_number",
        0.4,
        ("Which number is the {which}: {numbers}?", "Find the {which} number: {numbers}"),
        extreme_number_problems,
    ),
    Task(
        "small_sum",
        0.2,
        ("What is {left} + {right}?", "Add {left} and {right}.", "{left} + {right} ="),
        sum_problems,
    ),
    Task(
        "weekday",
        0.15,
        (
            "Which day is {span} {side} {day}?",
            "What day comes {span} {side} {day}?",
            "Name the day {span} {side} {day}.",
        ),
        weekday_problems,
    ),
    Task(
        "odd_or_even",
        0.25,
        ("Is {number} odd or even?", "Odd or even: {number}?"),
        parity_problems,
    ),
)


def shares(total: int) -> dict[str, int]:
    """How many of `total` records each task gets: in proportion to the weights, adding up exactly."""
    weight_sum = sum(task.weight for task in TASKS)
    counts = {task.name: int(total * task.weight / weight_sum) for task in TASKS}
    for task in itertools.islice(itertools.cycle(TASKS), total - sum(counts.values())):
        counts[task.name] += 1
    return counts


def records_of(task: Task, train: int, heldout: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Records of one task. Held-out problems are set aside first, so no wording of them is ever trained on.

    When a task has fewer problems than records, the others come again in another wording.
    """
    rng = random.Random(f"{seed}/{task.name}")
    distinct: dict[tuple, Problem] = {}
    misses = 0
    for fields, answer in task.problems(rng):
        before = len(distinct)
        distinct.setdefault(tuple(fields.values()), (fields, answer))
        misses = misses + 1 if len(distinct) == before else 0
        if len(distinct) >= train + heldout or misses > 1000:
            break
    problems = list(distinct.values())
    kept = [record(task, problem, rng.choice(task.wordings)) for problem in problems[:heldout]]
    trained = []
    first = {id(problem): rng.randrange(len(task.wordings)) for problem in problems}
    for turn in range(len(task.wordings)):
        for problem in problems[heldout:]:
            trained.append(record(task, problem, task.wordings[(first[id(problem)] + turn) % len(task.wordings)]))
    if len(kept) < heldout or len(trained) < train:
        raise SystemExit(
            f"task {task.name} has {len(problems)} problems in {len(task.wordings)} wordings: "
            f"{train} training and {heldout} held-out records cannot be made; ask for fewer or lower its weight"
        )
    return trained[:train], kept


def record(task: Task, problem: Problem, wording: str) -> dict:
    fields, answer = problem
    messages = [{"role": "user", "content": wording.format(**fields)}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "answer": answer, "task": task.name}


def write_jsonl(path: Path, records: list[dict]) -> None:
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

    train_shares, heldout_shares = shares(options.train), shares(options.heldout)
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
