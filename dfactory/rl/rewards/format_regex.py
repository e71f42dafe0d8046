"""The whole response has to match a regular expression."""

import re

from dfactory.rl.rewards.base import REWARDS, Reward
from dfactory.rl.rewards.deadline import within
from dfactory.rl.rewards.text import completion_text


def format_regex(prompts, completions, *, pattern: str | list[str], timeout_s: float = 2.0, **columns) -> list[float]:
    """1 where the whole response matches, else 0. `pattern` is an option of the recipe, or a column with one a row.

    `.` matches line ends too. White space at the ends counts: say so in the pattern where it is allowed. A response on
    which the pattern backtracks for more than `timeout_s` of CPU time does not match.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    compiled = [re.compile(p, re.DOTALL) for p in patterns]
    texts = [completion_text(completion) for completion in completions]
    matches = [within(timeout_s, p.fullmatch, text, late=None) for p, text in zip(compiled, texts, strict=True)]
    return [float(match is not None) for match in matches]


def check_row(row: dict) -> None:
    if not isinstance(row["pattern"], str):
        raise ValueError(f"pattern {row['pattern']!r} is no text: give a regular expression")
    try:
        re.compile(row["pattern"], re.DOTALL)
    except re.error as problem:
        raise ValueError(f"pattern {row['pattern']!r} is no regular expression: {problem}") from problem


format_regex.check_row = check_row
REWARDS.add(Reward(format_regex, per_rollout=True))
