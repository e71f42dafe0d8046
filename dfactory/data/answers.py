"""The part of a response that is compared with an answer: what a pattern captures, such as 42 in `The answer is 42.`"""

import re

from dfactory.errors import ConfigError

EXAMPLE = r"'The answer is (.+)\.'"
ANSWER_PATTERN_HELP = f"regular expression, such as {EXAMPLE}: its first group, where it matches last, is the answer"


def compiled_pattern(pattern: str | None, origin: str) -> re.Pattern | None:
    """The compiled pattern. Raises ConfigError, which names `origin`, for one that is wrong or captures nothing."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as problem:
        raise ConfigError(f"{origin} {pattern!r} is no regular expression: {problem}") from problem
    if not compiled.groups:
        raise ConfigError(f"{origin} {pattern!r} has no group: put the answer in parentheses, as in {EXAMPLE}")
    return compiled


def answer_in(text: str, pattern: re.Pattern | None) -> str:
    """The first group of the pattern's last match; the whole text without a pattern, or where it does not match.

    answer_in("2 + 2 = 4\\nThe answer is 4.", re.compile(r"The answer is (.+)\\.")) == "4"
    """
    captured = [match[1] for match in pattern.finditer(text)] if pattern is not None else []
    return captured[-1] if captured and captured[-1] is not None else text
