"""Rows of tests, programs in responses, and their scores. What programs may try is in tests/rl/test_sandbox.py."""

import time

import pytest

from dfactory.errors import ConfigError
from dfactory.rl.rewards.code_tests import code_tests, program_of, read_test, sandbox
from dfactory.rl.sandbox import Call, Isolation

SQUARE = "def square(x): return x * x"


def score(program, *tests, **options):
    return code_tests([""], [program], tests=[list(tests)], **options)[0]


def test_tests_of_every_kind():
    tests = [
        {"call": "square", "args": [3], "expected": 9},
        {"call": "square", "kwargs": {"x": -1.5}, "expected": 2.25},
        "assert square(4) == 16",
        "assert set(map(square, (1, -1, 2))) == set((1, 4))",
        "assert [square(i) for i in range(3)] == [0, 1, 4]",
        "assert square(1)",
        "assert not square(0)",
        "assert square(10**20) == 10000000000000000000000000000000000000000",
    ]
    assert score(SQUARE, *tests) == 1
    assert score("def square(x): return x + x", *tests) == 0
    assert score("def square(x): return x + x", *tests, partial=True) == 2 / 8
    script = {"stdin": "3\n4\n", "stdout": "9 \n16\n\n"}
    assert score("while True:\n    print(int(input()) ** 2)", script) == 0  # ends by EOFError
    assert score("import sys\nfor x in sys.stdin: print(int(x) ** 2)", script) == 1
    assert score(SQUARE + "\nprint(9)\nprint(16)", script, tests[0]) == 1


def test_one_failing_test_is_enough_and_none_after_an_end_counts():
    tests = [{"call": "f", "args": [i], "expected": i} for i in range(4)]
    assert score("def f(i): return i if i < 3 else 0", *tests) == 0
    assert score("def f(i): return i if i < 3 else 0", *tests, partial=True) == 0.75
    assert score("import os\ndef f(i): return i if i < 2 else os._exit(0)", *tests, partial=True) == 0.5
    assert score("def f(i):\n    if i == 1: raise ValueError\n    return i", *tests, partial=True) == 0.75


def test_the_time_limit_holds_over_all_tests():
    """Forty scripts of 0.2 s in 1 s: what comes after the limit has failed."""
    tests = [{"stdin": "", "stdout": "1"}] * 40
    started = time.monotonic()
    share = score("import time\ntime.sleep(0.2)\nprint(1)", *tests, partial=True, timeout_s=1.0)
    assert 1 / 40 <= share <= 6 / 40
    assert time.monotonic() - started < 10


def test_numbers_within_a_tolerance():
    test = {"call": "third", "args": [], "expected": 0.333333}
    program = "def third(): return 1 / 3"
    assert score(program, test) == 0
    assert score(program, test, tolerance=1e-5) == 1


def test_the_program_is_the_last_python_block_of_the_response():
    assert program_of("def f(): pass") == "def f(): pass"
    text = "First\n```python\nwrong\n```\nbetter\n```py\nright = '```'\n```\nand its output\n```text\n5\n```\nBye"
    assert program_of(text) == "right = '```'\n"
    assert program_of("```\nplain\n```") == "plain\n"
    assert program_of("```text\n5\n```\nso\n```Python \ncode\n```") == "code\n"
    assert program_of("```python\nnot closed") == "```python\nnot closed"
    message = [{"role": "assistant", "content": f"```python\n{SQUARE}\n```"}]
    assert code_tests([""], [message], tests=[["assert square(2) == 4"]]) == [1]


@pytest.mark.parametrize(
    "test",
    ["assert isclose(f(2), 3.14)", "assert abs(f(2) - 3.14) < 0.1", "assert (f(2) == 4)  == True", "assert not f(2) != 4",
     "assert f(2) == g(2)", "assert f(1) == 1 and f(2) == 2", "assert f(x)", "assert isinstance(f(1), int)", "f(2) == 4",
     "assert f(", "", "assert 1 <= f(2) <= 3", {"call": "f"}, {"stdin": "x"}, {"call": "f", "expected": 1, "arg": []}, 5],
)  # fmt: skip
def test_rows_whose_answers_would_reach_the_program_are_refused(test):
    with pytest.raises(ValueError, match="code_tests"):
        score(SQUARE, test)


def test_questions_hold_no_answers():
    assert read_test("assert f(2, k=[1]) == {'a': 4711}") == (Call(expression="f(2, k=[1])"), {"a": 4711})
    assert read_test("assert f('x') is None") == (Call(expression="f('x')"), None)
    assert read_test("assert not f(3)") == (Call(expression="bool(f(3))"), False)
    with pytest.raises(ValueError, match="`tests` is empty"):
        score(SQUARE)


def test_an_unknown_isolation_is_refused():
    with pytest.raises(ConfigError, match="isolation 'jail'"):
        score(SQUARE, "assert square(2) == 4", isolation="jail")


def test_a_weaker_isolation_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(
        "dfactory.rl.sandbox.sandbox.strongest_isolation", lambda: (Isolation.INTERPRETER, {"namespaces": "no"})
    )
    sandbox.cache_clear()
    assert score(SQUARE, "assert square(2) == 4") == 1
    assert "isolation interpreter only, as namespaces fails: no" in caplog.text
    assert "which is no wall" in caplog.text
    sandbox.cache_clear()
