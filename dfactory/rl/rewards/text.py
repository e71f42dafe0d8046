"""The text of a completion."""


def completion_text(completion: str | list[dict]) -> str:
    """A completion's text: itself, or the contents of its messages as TRL passes them for conversations."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)
