"""The pool with real processes: rewards that hang, crash, leak and lie cost only themselves."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from dfactory.errors import ConfigError
from dfactory.rl.rewards.pool import Outcome, RewardGroup, RewardPool, failure_messages, outcome_counts
from dfactory.rl.rewards.specs import RewardSpec, parse_rewards

HERE = Path(__file__).parents[1]  # tests/rl
TIMEOUT_S = 5.0  # generous: the processes share a busy machine


def bad(name, **changes):
    return RewardSpec(name, f"{HERE}/bad_rewards.py:{name}", **changes)


def group(*completions, **columns):
    return RewardGroup("p", list(completions), columns)


@pytest.fixture(scope="module")
def pool():
    before = set(psutil.Process().children(recursive=True))  # of other files' tests, such as a server of the session
    with RewardPool([bad("good"), bad("moody", weight=10.0)], workers=2, timeout_s=TIMEOUT_S, memory_mb=150) as pool:
        yield pool
    assert set(psutil.Process().children(recursive=True)) <= before


FAILURES = {
    "hang": (Outcome.TIMEOUT, f"no answer within {TIMEOUT_S:g} s"),
    "spin": (Outcome.TIMEOUT, "its process was replaced"),
    "deaf": (Outcome.TIMEOUT, "no answer"),
    "stop": (Outcome.TIMEOUT, "no answer"),
    "raise": (Outcome.ERROR, "bad_rewards.py:23: ZeroDivisionError: division by zero"),
    "nothing": (Outcome.ERROR, "TypeError"),
    "scalar": (Outcome.ERROR, "TypeError"),
    "exit": (Outcome.CRASH, "exit status 0"),
    "hard exit": (Outcome.CRASH, "exit status 3"),
    "crash": (Outcome.CRASH, "signal SIGSEGV"),
    "interrupt": (Outcome.CRASH, "the process ended"),
    "garbage": (Outcome.CRASH, "something else than an answer"),
    "short": (Outcome.WRONG_LENGTH, "1 rewards for 2 completions"),
    "text": (Outcome.NOT_A_NUMBER, "no finite number"),
    "none": (Outcome.UNSCORED, None),
    "print": (Outcome.OK, None),
}


@pytest.mark.parametrize("mood", FAILURES)
def test_a_failure_costs_only_its_own_call(pool, mood):
    outcome, message = FAILURES[mood]
    started = time.monotonic()
    before, found, after = pool.score([group("ab", "abc"), group(mood, "abc"), group("ab", "abc")])
    assert time.monotonic() - started < TIMEOUT_S + 30
    assert before.reward_G == after.reward_G == [12, 13]
    moody = found.functions["moody"]
    assert moody.outcome_G == [outcome] * 2
    assert found.functions["good"].score_G == [len(mood), 3]
    expected = {Outcome.OK: [len(mood) + 10, 13], Outcome.UNSCORED: [len(mood), 3]}
    assert found.reward_G == expected.get(outcome, [None, None])
    if message is None:
        assert not moody.messages
    else:
        assert message in moody.messages[0]
        assert message in next(iter(failure_messages([before, found, after])))


def test_a_number_that_is_none_spoils_only_its_rollout(pool):
    result = pool.score([group("nan", "a", "b", "c")])[0]
    bad_number = Outcome.NOT_A_NUMBER
    assert result.functions["moody"].outcome_G == [bad_number, bad_number, Outcome.OK, Outcome.UNSCORED]
    assert result.reward_G == [None, None, 1 + 10, 1]


def test_many_groups_keep_their_order_while_processes_die(pool):
    moods = ["ab", "exit", "abc", "crash", "abcd", "raise", "hang", "abcde"] * 4
    moods = [*moods[:-9], "a"]  # 3 hangs
    results = pool.score(group(mood, "x" * i) for i, mood in enumerate(moods))
    assert [r.functions["good"].score_G for r in results] == [[len(mood), i] for i, mood in enumerate(moods)]
    counts = outcome_counts(results)
    named = Counter(moods)
    assert counts["moody", Outcome.CRASH] == 2 * (named["exit"] + named["crash"])
    assert counts["moody", Outcome.TIMEOUT] == 2 * named["hang"] == 6
    assert counts["moody", Outcome.ERROR] == 2 * named["raise"]
    assert counts.total() == 2 * 2 * len(moods)


def test_a_leaking_process_is_replaced(pool):
    restarts = pool.restarts
    results = pool.score([group("leak") for _ in range(4)] + [group("a")] * 4)
    assert all(result.reward_G != [None] for result in results)
    assert pool.restarts > restarts


def test_what_a_reward_leaves_behind_dies_with_its_process():
    with RewardPool([bad("moody")], workers=1, timeout_s=TIMEOUT_S) as pool:
        assert pool.score([group("child")])[0].reward_G == [1]
        (left,) = [child for child in psutil.Process().children(recursive=True) if child.name() == "sleep"]
    deadline = time.monotonic() + 10  # the signal is sent at once, the kernel takes its time
    while time.monotonic() < deadline and left.is_running() and left.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE


KILLED_AT_START = """
import os, pathlib, signal
mark = pathlib.Path(__file__).with_suffix(".mark")
if not mark.exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)

def fine(completions, **columns):
    return [1.0] * len(completions)
"""


def test_a_process_that_is_killed_while_it_starts_is_started_again(tmp_path):
    (tmp_path / "reward.py").write_text(KILLED_AT_START)
    with RewardPool([RewardSpec("fine", f"{tmp_path}/reward.py:fine")], workers=1) as pool:
        assert pool.score([group("a")])[0].reward_G == [1.0]


def test_scores_are_computed_while_the_caller_goes_on(pool):
    future = pool.submit(group("hang"))
    assert not future.done()
    quick = pool.submit(group("ab")).result(timeout=20)
    assert quick.reward_G == [12]
    assert not future.done()
    assert future.result(timeout=20).functions["moody"].outcome_G == [Outcome.TIMEOUT]

    async def gathered():
        return await asyncio.gather(*(asyncio.wrap_future(pool.submit(group("x" * i))) for i in range(1, 4)))

    assert [result.reward_G for result in asyncio.run(gathered())] == [[11], [12], [13]]


def test_none_is_absent_from_the_weighted_sum():
    specs = [bad("even", weight=3.0), bad("good", weight=0.5), bad("slowly")]
    with RewardPool(specs, workers=1) as pool:
        assert pool.score([group("ab", "abc")])[0].reward_G == [3 + 1 + 2, 1.5 + 2]
    with RewardPool([bad("even")], workers=1) as pool:
        result = pool.score([group("ab", "abc")])[0]
        assert result.reward_G == [1, None]
        assert outcome_counts([result]) == {("even", Outcome.OK): 1, ("even", Outcome.UNSCORED): 1}


@pytest.mark.parametrize("per_rollout", [False, True])
def test_what_a_function_gets_and_logs(per_rollout):
    row = {"answer": "42", "task": "t", "prompt": "p", "completion": "c"}
    per = {"completion_ids": [[1], [1, 2]], "forwards": [5, 5]}
    asked = RewardGroup("p", ["a", "b"], row, per)
    with RewardPool([bad("told", per_rollout=per_rollout)], workers=2) as pool:
        assert pool.required_columns == {"told": ["answer"]}
        scores = pool.score([asked])[0].functions["told"]
    assert scores.score_G == [1, 2], scores.messages
    assert scores.metrics == ([("asked", 1.0)] * 2 if per_rollout else [("asked", 2.0)])
    assert scores.extra == {"seen": ["42", "42"]}


def test_a_hang_per_rollout_costs_one_rollout():
    with RewardPool([bad("moody", per_rollout=True)], workers=2, timeout_s=TIMEOUT_S) as pool:
        result = pool.score([group("a", "hang", "crash", "b")])[0]
    assert result.functions["moody"].outcome_G == [Outcome.OK, Outcome.TIMEOUT, Outcome.CRASH, Outcome.OK]
    assert result.reward_G == [1, None, None, 1]


def test_processes_are_small_and_apart():
    with RewardPool([bad("environment")], workers=1) as pool:
        result = pool.score([group("a")])[0]
    assert result.functions["environment"].messages == []
    assert result.reward_G != [os.getpid()]


@pytest.mark.parametrize(
    "spec, message",
    [
        (bad("gone"), "the file has no gone"),
        (RewardSpec("x", "{folder}/broken.py:x"), "cannot be imported: .*: SyntaxError"),
        (RewardSpec("x", "{folder}/gone.py:x"), "cannot be imported: .*: FileNotFoundError"),
        (RewardSpec("exact_match", "exact_match", options={"case": 1}), "has no option case"),
    ],
)
def test_rewards_that_cannot_be_loaded(spec, message, tmp_path):
    (tmp_path / "broken.py").write_text("def x(:\n")
    spec = dataclasses.replace(spec, target=spec.target.replace("{folder}", str(tmp_path)))
    before = psutil.Process().children()
    with pytest.raises(ConfigError, match=message):
        RewardPool([spec], workers=2)
    assert psutil.Process().children() == before


def test_builtins_through_the_pool():
    """A recipe's entries, from YAML form to rewards; hostile answers among them."""
    entries = [
        {"name": "math_verify", "timeout_s": 5},
        {"name": "length_shaping", "weight": 0.5, "max_length": 8, "cache": 4},
        {"name": "format_regex", "pattern": "(a+)+b|.*42.*", "weight": 0.1},
    ]
    texts = ["42", r"\boxed{42}", "41", "9^9^9^9", "a" * 60]
    asked = RewardGroup("p", texts, {"answer": "42"}, {"completion_ids": [[0] * n for n in (2, 8, 6, 2, 2)]})
    with RewardPool(parse_rewards(entries), workers=2, timeout_s=12) as pool:
        result = pool.score([asked])[0]
    assert result.functions["math_verify"].score_G == [1, 1, 0, 0, 0]
    assert set(result.functions["format_regex"].outcome_G) == {Outcome.OK}  # the pattern that backtracks too
    assert result.reward_G == [1.1, 1 - 0.5 + 0.1, -0.25, 0, 0]


def test_generated_code_through_the_pool():
    specs = parse_rewards([{"name": "code_tests", "timeout_s": 2}], allow_code_execution=True)
    programs = ["def f(x): return x", "while True: pass", "import os; os._exit(0)", "def f(x): return 1"]
    with RewardPool(specs, workers=2) as pool:
        result = pool.score([group(*programs, tests=["assert f(1) == 1", "assert f(2) == 2"])])[0]
    assert result.reward_G == [1, 0, 0, 0]
    shares = {name: value for name, value in result.functions["code_tests"].metrics if value}
    assert shares == {f"code_tests/{ending}": 1.0 for ending in ("finished", "timeout", "died")}


def test_a_value_that_cannot_be_sent_is_the_callers_error(pool):
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        pool.score([group("a", what=lambda: None)])
    assert pool.score([group("ab")])[0].reward_G == [12]


def test_processes_end_with_their_parent():
    code = (
        "from tests.rl.rewards.test_pool import *\n"
        "pool = RewardPool([bad('moody')], workers=2, timeout_s=1000)\n"
        "pool.submit(group('deaf')); print('up', flush=True)\ntime.sleep(1000)"
    )
    root = HERE.parents[1]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "up\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert psutil.wait_procs(children, timeout=5)[1] == []
