"""Builtin rewards on correct, wrong, malformed, hanging and cheating answers."""

import inspect
import time

import pytest
import reasoning_gym as gym
from reasoning_gym.factory import DATASETS

from dfactory.errors import ConfigError
from dfactory.rl.rewards.exact_match import exact_match
from dfactory.rl.rewards.format_regex import format_regex
from dfactory.rl.rewards.length_shaping import length_shaping
from dfactory.rl.rewards.math_verify import math_verify
from dfactory.rl.rewards.reasoning_gym import (
    EVALUATE_EXPRESSIONS,
    EVALUATE_LITERALS,
    is_arithmetic,
    is_literal_or_no_python,
    reasoning_gym,
)
from dfactory.rl.rewards.tokens_per_forward import tokens_per_forward


def call(reward, completions, **columns):
    columns = {name: [value] * len(completions) if not isinstance(value, list) else value
               for name, value in columns.items()}  # fmt: skip
    return reward(prompts=["?"] * len(completions), completions=completions, log_metric=None, **columns)


def test_exact_match():
    texts = ["42", " 42\n", "43", "", "42 or 43", "the answer is 42", "4 2", "٤٢"]
    assert call(exact_match, texts, answer="42") == [1, 1, 0, 0, 0, 0, 0, 0]
    messages = [[{"role": "assistant", "content": "42"}], [{"role": "assistant", "content": "41"}]]
    assert call(exact_match, messages, answer=" 42") == [1, 0]
    assert call(exact_match, ["4", "0.5", "4.0"], answer=[4, 0.5, 4]) == [1, 1, 0]
    with pytest.raises(ValueError, match="answer None is neither text nor a number"):
        call(exact_match, ["4"], answer=None)


SOLVED = r"The answer is (.+)\."


def test_the_answer_of_a_response_is_what_a_pattern_captures():
    texts = ["2 + 2 = 4\nThe answer is 4.", "The answer is 5.\nNo. The answer is 4.", "4", "The answer is 4"]
    assert exact_match([""] * 4, texts, answer=["4"] * 4, answer_pattern=SOLVED) == [1, 1, 1, 0]
    assert exact_match([""], ["The answer is 3.5."], answer=[3.5], answer_pattern=SOLVED) == [1]
    entry = {"answer": "4"}
    assert reasoning_gym([""] * 3, texts[:3], task=["chain_sum"] * 3, entry=[entry] * 3, answer_pattern=SOLVED) == [
        1,
        1,
        1,
    ]
    wrong = ["The answer is 5.", "4\nThe answer is 5."]
    assert max(reasoning_gym([""] * 2, wrong, task=["chain_sum"] * 2, entry=[entry] * 2, answer_pattern=SOLVED)) < 1


def test_a_pattern_that_cannot_work_is_refused_and_one_that_backtracks_is_bounded():
    for function in (exact_match, reasoning_gym):
        function.prepare()
        with pytest.raises(ConfigError, match=rf"reward {function.__name__}: answer_pattern 'a' has no group"):
            function.prepare(answer_pattern="a")
        with pytest.raises(ConfigError, match="is no regular expression: missing"):
            function.prepare(answer_pattern="(")
        hostile = {"answer": ["1"], "task": ["chain_sum"], "answer_pattern": "(a|a)*b", "timeout_s": 0.2}
        assert function([""], ["a" * 60], **hostile) == [0]


MATH = [
    ("42", "42", 1),
    (r"so it is \boxed{\frac{84}{2}}.", "42", 1),
    (r"$\frac{2}{6}$", r"\frac{1}{3}", 1),
    (r"\boxed{(x+1)^2}", "$x^2+2x+1$", 1),
    ("first 7, then 42", "42", 1),
    ("41", "42", 0),
    ("", "42", 0),
    ("no idea", "42", 0),
    ("(" * 3000, "42", 0),
    (r"\boxed{" * 500, "42", 0),
    (r"\boxed{41} \boxed{42}", "42", 0),
    (r"\boxed{40, 41, 42}", "42", 0),
    (r"\boxed{41 \text{ or } 42}", "42", 0),
    (r"\boxed{41 = 42}", "42", 0),
    (r"\boxed{40 \le x \le 45}", "42", 0),
    ("__import__('os').system('touch hacked')", "42", 0),
    ("anything", "not mathematics", None),
]


@pytest.mark.parametrize("text, answer, expected", MATH, ids=range(len(MATH)))
def test_math_verify(text, answer, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(math_verify, [text], answer=answer) == [expected]
    assert not list(tmp_path.iterdir())


def test_an_answer_may_be_a_number():
    assert call(math_verify, ["4", "1/2", "3"], answer=[4, 0.5, 4]) == [1, 1, 0]


def test_math_verify_can_demand_an_anchor():
    texts = ["42", r"\boxed{42}", "The answer is 42"]
    assert math_verify([""] * 3, texts, answer=["42"] * 3, require_anchor=True) == [0, 1, 1]


def test_math_verify_stops_at_its_time_limit():
    started = time.monotonic()
    assert math_verify([""], [r"\boxed{9^{9^{9^{9}}}}"], answer=["42"], timeout_s=1) == [0]
    assert time.monotonic() - started < 4


def test_reasoning_gym_scores_its_own_answers():
    for name in ("chain_sum", "spiral_matrix", "countdown", "simple_integration", "word_sorting"):
        dataset = gym.create_dataset(name, seed=3, size=2)
        entries = list(dataset)
        answers = [str(entry["answer"]) for entry in entries]
        assert call(reasoning_gym, answers, task=name, entry=entries) == [1, 1], name
        flat = {key: [entry[key] for entry in entries] for key in ("question", "answer", "metadata")}
        assert call(reasoning_gym, answers, **flat) == [1, 1], name
        tagged = [f"so: <answer>{answer}</answer>" for answer in answers]
        assert reasoning_gym(["?"] * 2, tagged, entry=entries, answer_tag="answer") == [1, 1], name
        wrong = call(reasoning_gym, ["", "@" * 50], task=name, entry=entries)
        assert max(wrong) <= 0.05, name


CODE = [
    "__import__('os').system('touch hacked')",
    "[__import__('os').system('touch hacked')]",
    "  [c for c in open('hacked', 'w').write('x')]",
    "5! + __import__('os').system('touch hacked')",
    "(lambda: open('hacked', 'w'))()",
    "open('hacked', 'w')",
    "preview(x)",
    "(preview)(x)",
    "().__class__.__base__.__subclasses__()",
    "1 .__class__",
    "x.diff(x)",
    "`touch hacked`",
    "exec(chr(111))",
    "[[1, 2], [open('hacked','w')]]",
]


@pytest.mark.parametrize("task", sorted(EVALUATE_LITERALS | EVALUATE_EXPRESSIONS))
def test_reasoning_gym_does_not_run_what_the_model_wrote(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = gym.create_dataset(task, seed=0, size=1)[0]
    assert max(call(reasoning_gym, CODE, task=task, entry=entry)) <= 0.01
    assert not list(tmp_path.iterdir())


def test_arithmetic_and_literals_are_told_from_code():
    for text in ("3*x**2/2 + sin(2*x) + C", "(4 + 5)*6 - 7/2", "-log(x) + sqrt (2)", ".5*x", "5! + 1", "exp(exp(x))"):
        assert is_arithmetic(text), text
    for text in ("[[1, 2], [3, 4]]", "['A', 'B']", "1 2 3", "A B\nC D", "", "_ Q _\nQ _ _", "(1, -2.5)", "[1,"):
        assert is_literal_or_no_python(text), text
    for text in CODE:
        assert not is_arithmetic(text), text
    assert not is_literal_or_no_python("-" * 100_000 + "1")


def test_the_screen_of_expressions_is_fast_on_hostile_text():
    started = time.monotonic()
    for text in ("1" * 999 + "_", "a" * 998 + "_(", "1." * 499 + "_", "(" * 999 + "_", "sin" * 333, "x" * 10**7):
        is_arithmetic(text)
    assert time.monotonic() - started < 1


def test_every_scorer_that_evaluates_responses_is_screened():
    """Fails when a new version of reasoning-gym evaluates answers in another task."""
    evaluating = set()
    for name, (dataset_class, _) in DATASETS.items():
        source = inspect.getsource(dataset_class.score_answer)
        if "eval(" in source.replace('eval(entry["answer"])', "") or "parse_expr(" in source or "sympify(" in source:
            evaluating.add(name)
    assert evaluating <= EVALUATE_LITERALS | EVALUATE_EXPRESSIONS


def test_format_regex():
    pattern = r"<think>.*</think>\s*\d+"
    texts = [
        "<think>a\nb</think> 42",
        "<think>a</think> x",
        "42",
        "",
        "junk <think></think> 42",
        "<think></think> 42 junk",
    ]
    assert format_regex([""] * 6, texts, pattern=pattern) == [1, 0, 0, 0, 0, 0]
    assert format_regex([""] * 2, ["a", "b"], pattern=["a", "a"]) == [1, 0]


def test_length_shaping():
    ids = [[1] * n for n in (0, 80, 81, 90, 100, 101, 5000)]
    found = length_shaping([""] * 7, [""] * 7, completion_ids=ids, max_length=100, cache=20)
    assert found == [0, 0, -0.05, -0.5, -1, -1, -1]
    with pytest.raises(ValueError, match="cache 200 must lie"):
        length_shaping([""], [""], completion_ids=[[1]], max_length=100, cache=200)


def test_tokens_per_forward():
    speeds = [0.0, 1.0, 3.5, 40.0]
    assert tokens_per_forward([""] * 4, [""] * 4, tokens_per_forward=speeds, scale=0.1, cap=0.5) == pytest.approx(
        [0, 0.1, 0.35, 0.5]
    )
