"""The whole response has to match a regular expression."""

import re

from dfactory.rl.rewards.text import completion_text


def format_regex(prompts, completions, *, pattern: str | list[str], **columns) -> list[float]:
    """1 where the whole response matches, else 0. `pattern` is an option of the recipe, or a column with one a row.

    `.` matches line ends too. White space at the ends counts: say so in the pattern where it is allowed. A pattern that
    backtracks without end is stopped by the time limit of the reward process, and then scores nothing.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    return [
        float(re.fullmatch(p, completion_text(c), re.DOTALL) is not None)
        for p, c in zip(patterns, completions, strict=True)
    ]
