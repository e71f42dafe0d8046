"""Texts that rewards compare: that of a completion, and that of a row's answer."""

from typing import Any


def completion_text(completion: str | list[dict]) -> str:
    """A completion's text: itself, or the contents of its messages as TRL passes them for conversations."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def answer_text(answer: Any) -> str:
    """A row's answer as text: itself, or a number as JSON writes it. Raises ValueError for anything else."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    raise ValueError(f'answer {answer!r} is neither text nor a number: write it as text, such as "answer": "4"')
