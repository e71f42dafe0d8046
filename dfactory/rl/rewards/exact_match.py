"""The response is the row's `answer`, white space at the ends aside."""

from dfactory.rl.rewards.base import REWARDS, Reward
from dfactory.rl.rewards.text import answer_text, completion_text


def exact_match(prompts, completions, *, answer: list[str | int | float], **columns) -> list[float]:
    """1 where the whole response is the answer, else 0. A response that holds the answer among others is wrong. An answer
    that is a number stands for its digits: 4 for "4"."""
    return [float(same_text(completion_text(c), answer_text(a))) for c, a in zip(completions, answer, strict=True)]


def same_text(text: str, answer: str) -> bool:
    return text.strip() == answer.strip()


def check_row(row: dict) -> None:
    answer_text(row["answer"])


exact_match.check_row = check_row
REWARDS.add(Reward(exact_match))
