"""The time of a reward grows with the length of what a model wrote, or is bounded; and then the answer is wrong, not
unscored."""

import time

import pytest
import reasoning_gym as gym
from reasoning_gym.factory import DATASETS

from dfactory.rl.rewards.base import REWARDS
from dfactory.rl.rewards.code_tests import lines, program_of
from dfactory.rl.rewards.deadline import within
from dfactory.rl.rewards.exact_match import exact_match
from dfactory.rl.rewards.format_regex import format_regex
from dfactory.rl.rewards.length_shaping import length_shaping
from dfactory.rl.rewards.math_verify import math_verify
from dfactory.rl.rewards.reasoning_gym import is_literal_or_no_python, reasoning_gym, tagged
from dfactory.rl.sandbox.answers import same

LONG = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def packages_are_imported():
    """A reward imports its packages when it is first called, which takes seconds that are not the reward's."""
    for reward in REWARDS:
        reward.load()


def seconds(function, *arguments, **options):
    started = time.process_time()
    function(*arguments, **options)
    return time.process_time() - started


@pytest.mark.parametrize(
    "unit",
    [
        "```python\n",
        "```\n",
        "```py\nx\n",
        "\n```",
        "` ",
        "``` ",
        "```a`\n",
        "x\n",
        "\n",
        " ",
        "```python",
        "``` \n\n",
        "\r\n",
    ],
)
def test_the_program_in_a_response(unit):
    text = unit * (LONG // len(unit))
    for hostile in (text, f"```python\n{text}", f"{text}\n```", f"```python\nx\n```\n{text}"):
        assert seconds(program_of, hostile) < 2
        assert seconds(lines, hostile) < 2


UNORDERED = {
    "numbers": (set(range(20_000)), {"set": list(range(1, 20_001))}),
    "numbers whose hashes collide": (set(range(5_000)), {"set": [{"int": hex(i * (2**61 - 1))} for i in range(5_000)]}),
    "texts": ({f"{i}" for i in range(20_000)}, {"set": [f"a{i}" for i in range(20_000)]}),
    "tuples": ({(i, i / 3) for i in range(20_000)}, {"set": [[i, -i / 3] for i in range(20_000)]}),
    "mappings": ({i: i for i in range(20_000)}, {"dict": [[i, -1] for i in range(20_000)]}),
    "sets of sets": ({frozenset({i}) for i in range(9_000)}, {"set": [{"set": [-i]} for i in range(9_000)]}),
    "one value": ({(i,) for i in range(9_000)}, {"set": [[0]] * 9_000}),
    "deep": ({(i,) for i in range(2)}, {"set": [eval("[" * 90 + "]" * 90), {"a": {}}]}),
    "not a number": ({float(i) for i in range(9_000)}, {"set": [{"float": "nan"}] * 9_000}),
}


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@pytest.mark.parametrize("name", UNORDERED)
def test_items_without_an_order(name, tolerance):
    expected, answer = UNORDERED[name]
    started = time.process_time()
    assert not same(answer, expected, tolerance)
    assert time.process_time() - started < 4


def test_items_without_an_order_that_are_equal():
    assert same({"set": [{"int": hex(2**70)}, 2.0, True, None, "a", [1, {"set": [3.5]}]]},
                {2**70, 2, 1, None, "a", (1, frozenset({3.5}))})  # fmt: skip
    assert same(
        {"dict": [["b", {"float": "inf"}], [[1, "x"], {"bytes": "6162"}]]}, {(1, "x"): b"ab", "b": float("inf")}
    )
    assert same({"set": [{"complex": [1, 2.5]}]}, {1 + 2.5j})
    assert same({"set": [0.1 + 0.2, 7]}, {0.3, 7.0}, tolerance=1e-9)
    assert not same({"set": [0.1 + 0.2, 7]}, {0.3, 7.0})
    assert not same({"set": ["s1:a", "1"]}, {"a", 1})


def test_a_pattern_that_backtracks_scores_0():
    started = time.process_time()
    texts = ["a" * 40 + "c", "aab", "x" * 200_000]
    assert format_regex([""] * 3, texts, pattern="(a+)+b", timeout_s=0.5) == [0, 1, 0]
    assert format_regex([""], ["a" * 100_000], pattern=".*a.*b.*c", timeout_s=0.5) == [0]
    assert time.process_time() - started < 3


MATH = ["(", r"\boxed{", "1+", "$", "9", "x=1 ", "the answer is ", r"\frac{", "1,", "1. "]


@pytest.mark.slow
@pytest.mark.parametrize("unit", MATH)
def test_math(unit):
    for text in (unit * (30_000 // len(unit)), r"\boxed{" + unit * (30_000 // len(unit)) + "}"):
        started = time.process_time()
        assert math_verify([""], [text], answer=["42"], timeout_s=1) == [0]
        assert time.process_time() - started < 4


def test_what_stands_between_tags():
    assert tagged("<a>1</a> <a> 2 </a> </a> <a>3", "a") == "2"
    assert tagged("<a>1<a>2</a>", "a") == "1<a>2"
    assert tagged("1</a>", "a") is None
    for unit in ("<a>", "</a>", "<a></a>", "<a> ", "<"):
        assert seconds(tagged, unit * (LONG // len(unit)), "a") < 2


HOSTILE = ["(" * 20_000, "1 " * 20_000, "9" * 5000, "a\n" * 20_000, "1," * 20_000, "[" * 20_000, "²٣" * 1000, "\0" * 100,
           "-" * 20_000, "nan inf 1e999", "1/0", "|" * 20_000, "x=1 " * 9000, str([[1] * 50] * 50), ""]  # fmt: skip
CONSTANT = {"game_of_life_halting", "propositional_logic"}  # tasks that give points to any text


@pytest.mark.slow
def test_every_scorer_of_reasoning_gym():
    for task in sorted(DATASETS.keys() - {"composite"}):  # which wants other tasks
        entry = gym.create_dataset(task, seed=3, size=1)[0]
        count = len(HOSTILE)
        started = time.process_time()
        scores = reasoning_gym([""] * count, HOSTILE, task=[task] * count, entry=[entry] * count, timeout_s=1)
        assert time.process_time() - started < 5, task
        assert task in CONSTANT or max(scores) < 0.5, task


def test_a_response_that_a_scorer_cannot_read_is_wrong_and_a_row_is_an_error():
    entry = gym.create_dataset("prime_factorization", seed=0, size=1)[0]
    assert reasoning_gym([""], ["no number"], task=["prime_factorization"], entry=[entry]) == [0]
    with pytest.raises(KeyError):
        reasoning_gym([""], ["2"], task=["prime_factorization"], entry=[{"metadata": {}}])
    assert not is_literal_or_no_python("[" * LONG)


def test_rewards_that_only_look_at_text_and_lengths():
    assert seconds(exact_match, [""], [" " * LONG], answer=["4"]) < 1
    assert seconds(length_shaping, [""], [""], completion_ids=[[0] * LONG], max_length=9, cache=1) < 1


def test_the_bound_itself():
    def stubborn():
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    assert within(0.2, stubborn, late="late") == "late"
    assert within(0.2, len, "abc", late=None) == 3
    with pytest.raises(ZeroDivisionError):
        within(0.2, lambda: 1 / 0, late=None)
