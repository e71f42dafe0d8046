"""The quickstart's tasks: what is worked on, what is done to it, and how that is said as an instruction and as a statement.

A task draws subjects (letters, words, numbers) and changes them in one or several named ways. The same problem is an
instruction in the quickstart's records, "Reverse the letters: STONE", and a statement in the base model's corpus,
"STONE backwards: ENOTS". Every problem has one right answer.

What the model has to take apart is written in capitals and digits, each of which is one token of the embedded model,
and stands behind a sign or at the start, where a word, too, is the same token as anywhere in a list.
"""

import functools
import itertools
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from reasoning_gym.data import read_data_file

ALPHABET = string.ascii_uppercase
WORD_BANK = [
    *("apple", "bear", "blue", "book", "bread", "cat", "chair", "cheese", "cloud", "dog", "door", "fish", "green"),
    *("horse", "lemon", "red", "rice", "river", "snow", "star", "sun", "table", "tree", "white"),
]
STORY = "in_the_year_2889.txt"  # in the public domain; reasoning-gym carries it
ROLE_NAMES = {"system", "human", "assistant", "tool"}  # in capitals each is one token
Subject = list[str] | list[int]


class Problem(NamedTuple):
    """One problem: how the subject is written, what is done to it, and the answer."""

    subject: str
    how: str
    answer: str


@dataclass(frozen=True)
class Task:
    name: str
    weight: float  # share of the records, against the other tasks
    kind: str  # tasks of one kind can work on each other's subjects
    draw: Callable[[random.Random], Subject]
    show: Callable[[Subject], str]  # how a subject is written; no two subjects alike
    changes: dict[str, Callable[[Subject], str]]  # by what {how} says
    wordings: tuple[str, ...]  # of the instruction, with {it} and perhaps {how}
    statements: tuple[str, ...]  # in the base corpus, up to the answer

    def problem(self, subject: Subject, how: str) -> Problem:
        return Problem(self.show(subject), how, self.changes[how](subject))

    def problems(self, rng: random.Random) -> Iterator[Problem]:
        """Endless problems; small tasks repeat themselves."""
        while True:
            subject = self.draw(rng)
            yield self.problem(subject, rng.choice(list(self.changes)))


# --- subjects


@functools.cache
def story_words(shortest: int, longest: int) -> list[str]:
    found = set(re.findall(rf"\b[a-z]{{{shortest},{longest}}}\b", read_data_file(STORY)))
    return sorted(found - ROLE_NAMES)


def letters(shortest: int, longest: int) -> Callable[[random.Random], Subject]:
    """Capitals: a word of the story one time in four, else random letters."""

    def draw(rng: random.Random) -> Subject:
        if rng.random() < 0.25:
            return list(rng.choice(story_words(shortest, longest)).upper())
        return rng.choices(ALPHABET, k=rng.randint(shortest, longest))

    return draw


def words(shortest: int, longest: int) -> Callable[[random.Random], Subject]:
    return lambda rng: rng.sample(WORD_BANK, rng.randint(shortest, longest))


def digits(shortest: int, longest: int) -> Callable[[random.Random], Subject]:
    return lambda rng: rng.choices(range(10), k=rng.randint(shortest, longest))


def whole_number(below: int) -> Callable[[random.Random], Subject]:
    return lambda rng: [rng.randrange(below)]


def letter_range(rng: random.Random) -> Subject:
    """The ends of a stretch of 4 to 16 letters, the later one first half of the time."""
    length = rng.randint(4, 16)
    first = rng.randrange(len(ALPHABET) - length + 1)
    ends = [ALPHABET[first], ALPHABET[first + length - 1]]
    return ends if rng.random() < 0.5 else ends[::-1]


def number_range(rng: random.Random) -> Subject:
    """How many numbers, and the first of them."""
    return [rng.randint(4, 7), rng.randint(10, 99)]


# --- changes


def glue(parts: Subject) -> str:
    return "".join(map(str, parts))


def listed(parts: Subject) -> str:
    return ", ".join(map(str, parts))


def next_letters(parts: Subject) -> str:
    return glue([ALPHABET[(ALPHABET.index(letter) + 1) % 26] for letter in parts])


def without_vowels(parts: Subject) -> str:
    return glue([letter for letter in parts if letter not in "AEIOU"]) or "none"


def spell_range(ends: Subject) -> str:
    first, last = map(ALPHABET.index, ends)
    step = 1 if first < last else -1
    return glue([ALPHABET[index] for index in range(first, last + step, step)])


def count_by(step: int) -> Callable[[Subject], str]:
    return lambda parts: listed([parts[1] + step * index for index in range(parts[0])])


TASKS = (
    Task(
        "reverse_letters",
        1.5,
        "letters",
        letters(6, 16),
        glue,
        {"backwards": lambda parts: glue(parts[::-1])},
        ("Reverse the letters: {it}", "Write backwards: {it}", "Spell from the end: {it}"),
        ("{it} backwards: ", "Backwards, {it}: ", "From the end, {it}: "),
    ),
    Task(
        "sort_letters",
        1.5,
        "letters",
        letters(6, 14),
        glue,
        {"in order": lambda parts: glue(sorted(parts))},
        ("Sort the letters: {it}", "Put in alphabetical order: {it}"),
        ("{it} in alphabetical order: ", "In alphabetical order, {it}: "),
    ),
    Task(
        "next_letters",
        1.0,
        "letters",
        letters(6, 12),
        glue,
        {"next": next_letters},
        ("Write the next letter of each: {it}", "Move every letter one on: {it}"),
        ("{it} with every letter one on: ", "The next letters, {it}: "),
    ),
    Task(
        "double_letters",
        0.8,
        "letters",
        letters(4, 8),
        glue,
        {"twice": lambda parts: glue([letter * 2 for letter in parts])},
        ("Write every letter twice: {it}", "Double the letters: {it}"),
        ("{it} with every letter twice: ", "Double letters, {it}: "),
    ),
    Task(
        "drop_vowels",
        1.0,
        "letters",
        letters(8, 16),
        glue,
        {"without vowels": without_vowels},
        ("Leave out the vowels: {it}", "Write without A, E, I, O, U: {it}"),
        ("{it} without vowels: ", "Without vowels, {it}: "),
    ),
    Task(
        "letter_range",
        0.6,
        "letter_range",
        letter_range,
        lambda ends: f"{ends[0]} to {ends[1]}",
        {"all": spell_range},
        ("Write the letters from {it}", "Spell the alphabet from {it}"),
        ("The letters from {it}: ", "The alphabet from {it}: "),
    ),
    Task(
        "reverse_words",
        1.0,
        "words",
        words(4, 7),
        listed,
        {"backwards": lambda parts: listed(parts[::-1])},
        ("Reverse the list: {it}", "List these from last to first: {it}"),
        ("{it} from last to first: ", "From last to first, {it}: "),
    ),
    Task(
        "sort_words",
        1.2,
        "words",
        words(4, 7),
        listed,
        {"in order": lambda parts: listed(sorted(parts))},
        ("Sort the list: {it}", "List these in alphabetical order: {it}"),
        ("{it} in alphabetical order: ", "In alphabetical order, {it}: "),
    ),
    Task(
        "pick_word",
        0.4,
        "words",
        words(4, 6),
        listed,
        {"first": lambda parts: parts[0], "second": lambda parts: parts[1], "last": lambda parts: parts[-1]},
        ("Which word is {how}: {it}?", "Name the {how} word: {it}"),
        ("The {how} word, {it}: ", "{it}, the {how} word: "),
    ),
    Task(
        "sort_numbers",
        1.2,
        "digits",
        digits(5, 9),
        listed,
        {
            "smallest to largest": lambda parts: listed(sorted(parts)),
            "largest to smallest": lambda parts: listed(sorted(parts, reverse=True)),
        },
        ("Sort from {how}: {it}", "List these numbers from {how}: {it}"),
        ("From {how}, {it}: ", "{it} from {how}: "),
    ),
    Task(
        "extreme_number",
        0.4,
        "digits",
        digits(4, 7),
        listed,
        {"largest": lambda parts: str(max(parts)), "smallest": lambda parts: str(min(parts))},
        ("Which number is the {how}: {it}?", "Find the {how} number: {it}"),
        ("The {how} number, {it}: ", "{it}, the {how} number: "),
    ),
    Task(
        "count",
        0.8,
        "number_range",
        number_range,
        lambda parts: f"{parts[0]} numbers from {parts[1]}",
        {"up": count_by(1), "down": count_by(-1), "up by 2": count_by(2)},
        ("Count {how}: {it}", "Count {how} and write {it}"),
        ("Counting {how}, {it}: ", "{it} {how}: "),
    ),
    Task(
        "odd_or_even",
        0.3,
        "whole_number",
        whole_number(1000),
        glue,
        {"parity": lambda parts: "odd" if parts[0] % 2 else "even"},
        ("Is {it} odd or even?", "Odd or even: {it}?"),
        ("The number {it} is ", "{it} is "),
    ),
)


def shares(total: int, weights: dict[str, float]) -> dict[str, int]:
    """`total` dealt out in proportion to the weights, adding up exactly."""
    weight_sum = sum(weights.values())
    counts = {name: int(total * weight / weight_sum) for name, weight in weights.items()}
    for name in itertools.islice(itertools.cycle(weights), total - sum(counts.values())):
        counts[name] += 1
    return counts
