"""Answers as JSON: the shapes that clients of each endpoint expect, whole and in chunks."""

import dataclasses
import secrets
import time
from typing import Any, Protocol

from dfactory.serving.answers import Answer, usage
from dfactory.serving.requests import Generation


class Shape(Protocol):
    """One response to one request."""

    def whole(self, generation: Generation, answers: list[Answer]) -> dict[str, Any]: ...

    def chunk(self, index: int, answer: Answer, added: str) -> dict[str, Any]: ...

    def last(self, generation: Generation, answers: list[Answer]) -> dict[str, Any] | None:
        """A chunk behind all others, or None."""


class Native:
    """The names of an output line of `dfactory generate`."""

    def whole(self, generation: Generation, answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        return self._counts(answer, generation) | {"text": answer.text, "output_ids": answer.token_ids}

    def chunk(self, index: int, answer: Answer, added: str) -> dict[str, Any]:
        return {"text": added}

    def last(self, generation: Generation, answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        return {"text": ""} | self._counts(answer, generation)

    def _counts(self, answer: Answer, generation: Generation) -> dict[str, Any]:
        return {
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": len(answer.token_ids),
            "forwards": answer.forwards,
            "tokens_per_forward": len(answer.token_ids) / max(answer.forwards, 1),
            "seed": generation.rules.seed,
        }


@dataclasses.dataclass
class OpenAI:
    """What is common to both of OpenAI's shapes."""

    model: str
    prefix: str = ""
    kind: str = ""
    chunk_kind: str = ""

    def __post_init__(self):
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.model}

    def whole(self, generation: Generation, answers: list[Answer]) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        counts = usage(answers, len(answers) - sum(noise > 0 for noise in generation.noise_ids))
        return self.head | {"object": self.kind, "choices": choices, "usage": counts}

    def chunk(self, index: int, answer: Answer, added: str) -> dict[str, Any]:
        return self.head | {"object": self.chunk_kind, "choices": [self._part(index, answer, added)]}

    def last(self, generation: Generation, answers: list[Answer]) -> dict[str, Any] | None:
        if not generation.include_usage:
            return None
        return self.whole(generation, answers) | {"object": self.chunk_kind, "choices": []}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, index: int, answer: Answer, added: str) -> dict[str, Any]:
        raise NotImplementedError


@dataclasses.dataclass
class Completion(OpenAI):
    prefix: str = "cmpl"
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._part(index, answer, answer.text)

    def _part(self, index: int, answer: Answer, added: str) -> dict[str, Any]:
        return {"index": index, "text": added, "logprobs": None, "finish_reason": answer.openai_reason}


@dataclasses.dataclass
class ChatCompletion(OpenAI):
    prefix: str = "chatcmpl"
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": answer.openai_reason}

    def _part(self, index: int, answer: Answer, added: str) -> dict[str, Any]:
        delta = {"role": "assistant", "content": added}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": answer.openai_reason}


def error(message: str, kind: str, code: str) -> dict[str, Any]:
    """OpenAI's shape, which its clients turn into exceptions; for every endpoint."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
