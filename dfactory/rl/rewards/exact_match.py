"""The response is the row's `answer`, white space at the ends aside."""

from dfactory.rl.rewards.text import completion_text


def exact_match(prompts, completions, *, answer: list[str], **columns) -> list[float]:
    """1 where the whole response is the answer, else 0. A response that holds the answer among others is wrong."""
    return [float(same_text(completion_text(c), a)) for c, a in zip(completions, answer, strict=True)]


def same_text(text: str, answer: str) -> bool:
    return text.strip() == answer.strip()
