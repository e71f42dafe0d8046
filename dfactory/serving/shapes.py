"""Answers as JSON in the shape of each endpoint, whole and in chunks."""

import dataclasses
import secrets
import time
from collections.abc import Iterator
from typing import Any, Protocol

from dfactory.serving.answers import Answer, usage
from dfactory.serving.requests import Generation


class Shape(Protocol):
    """One response to one request."""

    def whole(self, answers: list[Answer]) -> dict[str, Any]: ...

    def chunks(self, index: int, answer: Answer, added: str) -> Iterator[dict[str, Any]]:
        """The chunks of a stream when an answer gains text or ends."""

    def last(self, answers: list[Answer]) -> dict[str, Any] | None:
        """A chunk after all others, or None."""


@dataclasses.dataclass
class Native:
    """The names of an output line of `dfactory generate`."""

    generation: Generation

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        return self._counts(answer) | {"text": answer.text, "output_ids": answer.token_ids}

    def chunks(self, index: int, answer: Answer, added: str) -> Iterator[dict[str, Any]]:
        yield {"text": added}

    def last(self, answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        return {"text": ""} | self._counts(answer)

    def _counts(self, answer: Answer) -> dict[str, Any]:
        return {
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": len(answer.token_ids),
            "forwards": answer.forwards,
            "tokens_per_forward": len(answer.token_ids) / max(answer.forwards, 1),
            "seed": self.generation.rules.seed,
        }


@dataclasses.dataclass
class OpenAI:
    """The common part of both OpenAI shapes."""

    model: str
    generation: Generation
    prefix: str = ""
    kind: str = ""
    chunk_kind: str = ""

    def __post_init__(self):
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.model}

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self.head | {"object": self.kind, "choices": choices, "usage": self._usage(answers)}

    def last(self, answers: list[Answer]) -> dict[str, Any] | None:
        if not self.generation.include_usage:
            return None
        return self.head | {"object": self.chunk_kind, "choices": [], "usage": self._usage(answers)}

    def _usage(self, answers: list[Answer]) -> dict[str, float]:
        return usage(answers, len(answers) - sum(noise > 0 for noise in self.generation.noise_ids))

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A chunk. If the client asked for usage, all chunks but the last have `usage: null`."""
        no_usage = {"usage": None} if self.generation.include_usage else {}
        return self.head | {"object": self.chunk_kind, "choices": [choice]} | no_usage


@dataclasses.dataclass
class Completion(OpenAI):
    prefix: str = "cmpl"
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def chunks(self, index: int, answer: Answer, added: str) -> Iterator[dict[str, Any]]:
        yield self._chunk(self._part(index, answer, added))

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._part(index, answer, answer.text)

    def _part(self, index: int, answer: Answer, added: str) -> dict[str, Any]:
        return {"index": index, "text": added, "logprobs": None, "finish_reason": answer.openai_reason}


@dataclasses.dataclass
class ChatCompletion(OpenAI):
    """A stream sends the role of an answer once, then its text, then why it ends, because clients concatenate chunks."""

    prefix: str = "chatcmpl"
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def __post_init__(self):
        super().__post_init__()
        self.begun: set[int] = set()

    def chunks(self, index: int, answer: Answer, added: str) -> Iterator[dict[str, Any]]:
        role = {} if index in self.begun else {"role": "assistant"}
        self.begun.add(index)
        if role or added:
            yield self._chunk(_delta(index, role | {"content": added}, None))
        if answer.finish_reason is not None:
            yield self._chunk(_delta(index, {}, answer.openai_reason))

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": answer.openai_reason}


def _delta(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def error(message: str, kind: str, code: str) -> dict[str, Any]:
    """An error in OpenAI's shape, which its clients turn into exceptions."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
