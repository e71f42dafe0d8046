"""Tests of the program that a response holds, run in the sandbox (dfactory/rl/sandbox/ says what that protects).

The row's column `tests` is a list of

    {"call": "add", "args": [2, 3], "kwargs": {}, "expected": 5}      a function and its value (JSON; tuples are lists)
    {"stdin": "2 3\\n", "stdout": "5\\n"}                               a script; lines compared without trailing spaces
    "assert sorted(f(2, 3)) == [5]"                                   MBPP's form: the right side is a literal

The program is the last fenced block of the response that is Python, or the whole response without any.
"""

import ast
import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dfactory.rl.rewards.base import REWARDS, Reward
from dfactory.rl.rewards.text import completion_text
from dfactory.rl.sandbox import Call, Ending, Isolation, Limits, Sandbox

logger = logging.getLogger(__name__)

FENCE = re.compile(r"```([^`]*)")
PYTHON = ("", "py", "python", "python3")


def code_tests(
    prompts,
    completions,
    *,
    tests: list[list],
    partial: bool = False,
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    tolerance: float = 0.0,
    isolation: str = "auto",
    log_metric=None,
    **columns,
) -> list[float]:
    """1 if every test passes, else 0; with `partial` the share that passes.

    `timeout_s` bounds a program over all its tests; what is left then fails. `tolerance`: relative and absolute.
    `isolation`: the wall around the programs, one of the sandbox's levels; auto takes the strongest that works here, and
    refuses to run without one. `interpreter` is no wall: ask for it by name for programs that you trust.
    Logs for each way in which a program can end the share of programs that ended so, as `code_tests/timeout` etc.
    Raises ValueError on a test that cannot be read: the row's fault, not the program's.
    """
    box = sandbox(timeout_s, memory_mb, isolation)
    endings: Counter[Ending] = Counter()
    scores = []
    for completion, row_tests in zip(completions, tests, strict=True):
        passed, ending = run_tests(box, program_of(completion_text(completion)), row_tests, tolerance)
        endings[ending] += 1
        scores.append(passed if partial else float(passed == 1))
    if log_metric is not None:
        for ending in Ending:
            log_metric(f"code_tests/{ending}", endings[ending] / len(completions))
    return scores


@functools.cache
def sandbox(timeout_s: float, memory_mb: int, isolation: str) -> Sandbox:
    limits = Limits(wall_s=timeout_s, cpu_s=int(timeout_s) + 1, memory_mb=memory_mb)
    box = Sandbox(limits, isolation)
    if box.isolation is Isolation.INTERPRETER:
        logger.warning("generated code runs with isolation interpreter, which is no wall: it can do what this user can")
    for stronger, reason in box.weaknesses.items():
        if isolation == "auto":
            logger.warning(
                "generated code runs with isolation %s only, as %s fails: %s", box.isolation, stronger, reason
            )
    return box


def run_tests(box: Sandbox, program: str, tests: list, tolerance: float) -> tuple[float, Ending]:
    """The share of tests that pass, and how the program ended: the first ending that is not FINISHED."""
    if not tests:
        raise ValueError("code_tests: a row's `tests` is empty: give at least one")
    tests = [read_test(test) for test in tests]
    questions = [(question, expected) for question, expected in tests if isinstance(question, Call)]
    scripts = [(stdin, stdout) for stdin, stdout in tests if isinstance(stdin, str)]
    results: list[tuple[bool, Ending]] = []
    left_s = box.limits.wall_s
    if questions:
        run = box.call(program, [question for question, _ in questions])
        wanted = [expected for _, expected in questions]
        passed = [answer.equals(value, tolerance) for answer, value in zip(run.answers, wanted, strict=False)]
        results += [(one, run.ending) for one in passed] or [(False, run.ending)]
        left_s -= run.seconds
    results += run_scripts(box, program, scripts, left_s)
    endings = [ending for _, ending in results if ending is not Ending.FINISHED]
    return sum(passed for passed, _ in results) / len(tests), endings[0] if endings else Ending.FINISHED


def run_scripts(box: Sandbox, program: str, scripts: list, left_s: float) -> Iterator[tuple[bool, Ending]]:
    """For each (standard input, expected output): is the output as expected, and how the script ended."""
    for stdin, stdout in scripts:
        if left_s <= 0:
            yield False, Ending.TIMEOUT
            continue
        run = box.script(program, stdin, left_s)
        left_s -= run.seconds
        yield run.ending is Ending.FINISHED and lines(run.output) == lines(stdout), run.ending


def program_of(text: str) -> str:
    """The last fenced block that is Python, else the whole text. An unclosed fence starts no block."""
    program, language, block = text, None, []
    for line in text.split("\n"):
        if language is None and (fence := FENCE.fullmatch(line)):
            language, block = fence[1].strip().lower(), []
        elif language is not None and line.rstrip(" \t") == "```":
            program = "".join(block) if language in PYTHON else program
            language = None
        elif language is not None:
            block.append(f"{line}\n")
    return program


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def read_test(test: Any) -> tuple[Call | str, Any]:
    """A test as (question, expected value) or (standard input, expected output)."""
    if isinstance(test, str):
        return read_assert(test)
    if isinstance(test, dict) and test.keys() == {"stdin", "stdout"}:
        return test["stdin"], test["stdout"]
    if isinstance(test, dict) and {"call", "expected"} <= test.keys() <= {"call", "expected", "args", "kwargs"}:
        return Call(test["call"], test.get("args") or [], test.get("kwargs") or {}), test["expected"]
    raise ValueError(
        f"code_tests: a test has call, args, expected, or stdin, stdout, or is an assert: {json.dumps(test)}"
    )


def read_assert(text: str) -> tuple[Call, Any]:
    """`assert EXPRESSION == LITERAL` or `is`; `assert f(1)` and `assert not f(1)`. The literal stays with us.

    `assert isclose(f(2), 3.14)` and its like are refused: the program would see 3.14, and could lie to isclose.
    """
    problem = ValueError(
        f"code_tests: {text!r} is not of the form `assert f(1) == literal`: state call, args, expected"
    )
    try:
        (statement,) = ast.parse(text.strip()).body
    except (SyntaxError, ValueError):
        raise problem from None
    if not isinstance(statement, ast.Assert):
        raise problem
    left, expected, bare = statement.test, True, False
    if isinstance(left, ast.Compare) and len(left.ops) == 1 and isinstance(left.ops[0], (ast.Eq, ast.Is)):
        left, expected = left.left, literal(left.comparators[0], problem)
    elif isinstance(left, ast.UnaryOp) and isinstance(left.op, ast.Not):
        left, expected, bare = left.operand, False, True
    else:
        bare = True
    guessable = isinstance(expected, bool)  # then the question must not hold what the answer is compared with
    if guessable and not (isinstance(left, ast.Call) and all(map(is_literal, arguments(left)))):
        raise problem
    if any(isinstance(node, (ast.Compare, ast.BoolOp)) for node in ast.walk(left)):
        raise problem
    return Call(expression=f"bool({ast.unparse(left)})" if bare else ast.unparse(left)), expected


def arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def literal(node: ast.expr, problem: ValueError) -> Any:
    """A literal's value, and that of set(...), tuple(...), list(...), frozenset(...) around literals."""
    kinds = {"set": set, "tuple": tuple, "list": list, "frozenset": frozenset}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and not node.keywords:
        return kinds[node.func.id](*(literal(argument, problem) for argument in node.args))
    if not is_literal(node):
        raise problem
    return ast.literal_eval(node)


def check_row(row: dict) -> None:
    """Raises ValueError for tests that cannot be read."""
    if not isinstance(row["tests"], list) or not row["tests"]:
        raise ValueError(f"code_tests: tests {row['tests']!r} is no list with at least one test")
    for test in row["tests"]:
        read_test(test)


def prepare(*, timeout_s: float = 5.0, memory_mb: int = 512, isolation: str = "auto", **options) -> None:
    """Refuse, before a run starts, an isolation that does not work here."""
    sandbox(timeout_s, memory_mb, isolation)


code_tests.check_row = check_row
code_tests.prepare = prepare
REWARDS.add(Reward(code_tests, per_rollout=True, runs_code=True))
