"""The response, or what a pattern captures of it, is the row's `answer`, white space at the ends aside."""

from dfactory.data.answers import compiled_pattern
from dfactory.rl.rewards.base import REWARDS, Reward
from dfactory.rl.rewards.text import answer_text, captured_text

PATTERN = "reward exact_match: answer_pattern"


def exact_match(
    prompts,
    completions,
    *,
    answer: list[str | int | float],
    answer_pattern: str | None = None,
    timeout_s: float = 2.0,
    **columns,
) -> list[float]:
    """1 where the whole response is the answer, else 0. A response that holds the answer among others is wrong. An answer
    that is a number stands for its digits: 4 for "4".

    `answer_pattern`: compare the first group of its last match instead, where it matches. A response on which it backtracks
    for more than `timeout_s` of CPU time is wrong.
    """
    pattern = compiled_pattern(answer_pattern, PATTERN)
    texts = [captured_text(completion, pattern, timeout_s) for completion in completions]
    pairs = zip(texts, answer, strict=True)
    return [float(text is not None and same_text(text, answer_text(one))) for text, one in pairs]


def same_text(text: str, answer: str) -> bool:
    return text.strip() == answer.strip()


def check_row(row: dict) -> None:
    answer_text(row["answer"])


def prepare(answer_pattern: str | None = None, **options) -> None:
    """Refuse a wrong pattern before the run starts."""
    compiled_pattern(answer_pattern, PATTERN)


exact_match.check_row, exact_match.prepare = check_row, prepare
REWARDS.add(Reward(exact_match))
