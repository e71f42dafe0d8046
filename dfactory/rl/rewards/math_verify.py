"""Mathematical equality with the row's `answer`, by the math-verify library (LaTeX, boxed or plain expressions).

math-verify compares the last expression of the response, or all boxed ones as a set: listing candidates does not help.
It accepts "6 * 7" for 42; whether a restated problem is an answer is for the prompt and `format_regex` to say.
"""

from dfactory.rl.rewards.base import REWARDS, Reward
from dfactory.rl.rewards.deadline import within
from dfactory.rl.rewards.text import answer_text, completion_text


def math_verify(
    prompts,
    completions,
    *,
    answer: list[str | int | float],
    require_anchor: bool = False,
    timeout_s: int = 2,
    **columns,
) -> list[float | None]:
    """1 where the response equals the answer, else 0; None where the row's answer is not mathematics.

    `require_anchor`: the expression has to be boxed or follow "the answer is". `timeout_s` bounds parsing and comparing,
    each, and twice that all of it; 9^9^9^9 is wrong after that. The timers are signals: call this from a main thread, as
    reward processes do.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    extraction = [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=not require_anchor),
        ExprExtractionConfig(try_extract_without_anchor=not require_anchor),
    ]

    def score(text: str, gold: list) -> float | None:
        if not gold:
            return None
        found = parse(
            text,
            extraction_config=extraction,
            extraction_mode="first_match",
            fallback_mode="no_fallback",
            parsing_timeout=timeout_s,
        )
        if any(is_false_equation(expression) for expression in found):
            return 0.0
        return float(verify(gold, found, timeout_seconds=timeout_s))

    answers = [answer_text(one) for one in answer]
    golds = {text: parse_gold(text, timeout_s) for text in set(answers)}
    texts = [completion_text(completion) for completion in completions]
    return [within(2 * timeout_s, score, text, golds[a], late=0.0) for text, a in zip(texts, answers, strict=True)]


def parse_gold(answer: str, timeout_s: int) -> list:
    """What the row's answer says; LaTeX may stand without its dollar signs. Empty: not mathematics."""
    from math_verify import parse

    found = parse(answer, parsing_timeout=timeout_s)
    return found or (parse(f"${answer}$", parsing_timeout=timeout_s) if "\\" in answer else [])


def is_false_equation(expression) -> bool:
    """41 = 42: math-verify reads the right-hand side of an equation only."""
    from sympy import Eq

    return isinstance(expression, Eq) and not expression.free_symbols and expression.lhs != expression.rhs


def check_row(row: dict) -> None:
    answer_text(row["answer"])


math_verify.check_row = check_row
REWARDS.add(Reward(math_verify, per_rollout=True, requires=("math_verify", "sympy")))
