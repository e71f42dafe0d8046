"""Texts that rewards compare: that of a completion, and that of a row's answer."""

import re
from typing import Any

from dfactory.data.answers import answer_in
from dfactory.rl.rewards.deadline import within


def completion_text(completion: str | list[dict]) -> str:
    """A completion's text: itself, or the contents of its messages as TRL passes them for conversations."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def captured_text(completion: str | list[dict], pattern: re.Pattern | None, timeout_s: float) -> str | None:
    """What `pattern` captures of a completion's text, or all of it. None if matching takes more than `timeout_s`."""
    text = completion_text(completion)
    return text if pattern is None else within(timeout_s, answer_in, text, pattern, late=None)


def answer_text(answer: Any) -> str:
    """A row's answer as text: itself, or a number as JSON writes it. Raises ValueError for anything else."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    raise ValueError(f'answer {answer!r} is neither text nor a number: write it as text, such as "answer": "4"')
