"""Bodies of HTTP requests -> what to decode. Whatever is wrong with one is a DataError or ConfigError: status 400.

Three kinds of body: /generate with the names of `dfactory generate` and its decode keys; OpenAI's completions and chat
completions, which take the decode keys besides. fields.py says which fields there are; null is as if left out.
"""

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import load_json, text, tools
from dfactory.data.prompts import messages_of
from dfactory.decoding import DecodeRules, check_prompts
from dfactory.decoding.response import document_length
from dfactory.decoding.slots import LAYOUT
from dfactory.decoding.templates import fill_in, fixed_text
from dfactory.errors import DataError
from dfactory.inference import Pipeline
from dfactory.serving.bounds import (
    MOST_ANSWERS,
    MOST_MESSAGES,
    MOST_STOPS,
    STOP_CHARACTERS,
    check_containers,
    check_fields,
    check_text,
)
from dfactory.serving.fields import (
    CHAT,
    COMPLETIONS,
    DECODE_FIELDS,
    NATIVE,
    as_decode_keys,
    known_fields,
    template_variables,
    wants_usage,
)
from dfactory.vocabulary import Vocabulary

FIXED = ("max_new_tokens", "blocks_from", "seed")  # during an answer
TEMPERATURES = (0.01, 100.0)  # beyond, float32 runs over


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer for each of `prompts`, a prompt of which n are wanted standing there n times."""

    prompts: list[list[int]]
    noise_ids: list[int]  # which of its prompt's answers: with the seed, what an answer's draws depend on
    rules: DecodeRules
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    draft: tuple[int, ...] = ()  # of each answer: a template with masks for its blanks


Encode = Callable[[Any, dict[str, Any]], list[int]]  # a prompt as its body has it -> ids


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns bodies into Generations, for one model."""

    name: str  # of the model
    pipeline: Pipeline  # its keys hold where a request says nothing
    longest: int  # prompt and answer, in tokens
    most_answers: int = MOST_ANSWERS  # to one request

    def native(self, raw: bytes) -> Generation:
        body = self._body(raw, NATIVE)
        kinds = [name for name in ("prompt", "messages", "prompt_ids") if name in body]
        if len(kinds) != 1:
            raise DataError(f"{' and '.join(kinds) or 'no prompt'}: give one of prompt, messages, prompt_ids")
        encode = {"messages": self._conversation, "prompt": self._text, "prompt_ids": self._ids}[kinds[0]]
        generation = self._generation(body, [body[kinds[0]]], encode)
        return generation if "template" not in body else self._filled_in(generation, body["template"])

    def change(self, raw: bytes, before: DecodeRules, draft: tuple[int, ...]) -> DecodeRules:
        """The rules of a running answer, or template, that goes on by the decode keys of a body."""
        keys = self._body(raw, ())
        fixed = [name for name in FIXED if name in keys]
        if fixed:
            raise DataError(f"{fixed[0]} cannot change during an answer: leave it out")
        asked = self.pipeline.over(keys, "the request")
        _check_temperature(asked.keys.temperature)
        changed = dataclasses.replace(asked.rules, seed=before.seed, **{name: getattr(before, name) for name in LAYOUT})
        return fixed_text(changed, self.vocabulary.special.produced) if draft else changed

    def completions(self, raw: bytes) -> Generation:
        body = self._body(raw, COMPLETIONS, openai=True)
        if "prompt" not in body:
            raise DataError("prompt is missing: text, token ids, or a list of either")
        prompt = body["prompt"]
        several = isinstance(prompt, list) and bool(prompt) and not all(type(token) is int for token in prompt)
        entries = prompt if several else [prompt]
        return self._generation(body, entries, self._text_or_ids)

    def chat(self, raw: bytes) -> Generation:
        body = self._body(raw, CHAT, openai=True)
        if "messages" not in body:
            raise DataError("messages is missing: a list of {role, content}")
        return self._generation(body, [body["messages"]], self._conversation)

    def _body(self, raw: bytes, own: tuple[str, ...], openai: bool = False) -> dict[str, Any]:
        """A JSON object of known fields, without nulls and what asks for nothing."""
        check_containers(raw)
        try:
            body = load_json(raw.decode())
        except (ValueError, RecursionError) as problem:
            raise DataError(f"the body is not JSON: {problem}") from problem
        if not isinstance(body, dict):
            raise DataError(f"the body is {type(body).__name__}, not an object: {{...}}")
        check_fields(body)
        body = known_fields(body, own, openai)
        if body.get("model", self.name) != self.name:
            raise UnknownModel(f"there is no model {str(body['model'])[:80]}: this server has {self.name}")
        return as_decode_keys(body) if openai else body

    def _generation(self, body: dict[str, Any], entries: list[Any], encode: Encode) -> Generation:
        """What is quickly seen to be wrong is refused before anything is encoded."""
        count = _of_type(body, "n", int, 1)
        if not 1 <= count * len(entries) <= self.most_answers:
            raise DataError(f"{len(entries)} prompts with n {count}: a request has 1 to {self.most_answers} answers")
        stop, stream = _stop(body.get("stop", [])), _of_type(body, "stream", bool, False)
        include_usage = wants_usage(_of_type(body, "stream_options", dict, {}))
        prompts = [encode(entry, body) for entry in entries]
        rules = self._rules(body, max(len(prompt) for prompt in prompts))
        check_prompts(prompts, rules, self.vocabulary.size)
        return Generation(
            [prompt for prompt in prompts for _ in range(count)],
            [choice for _ in prompts for choice in range(count)],
            rules,
            stop,
            stream,
            include_usage,
        )

    def _rules(self, body: dict[str, Any], prompt_length: int) -> DecodeRules:
        values = {name: body[name] for name in DECODE_FIELDS if name in body}
        for name in ("max_tokens", "max_completion_tokens"):
            if name in body and values.setdefault("max_new_tokens", body[name]) != body[name]:
                raise DataError(f"{name} {body[name]} and another limit {values['max_new_tokens']}: give one")
        room = self.capacity - prompt_length
        if room < 1:
            raise DataError(
                f"the prompt has {prompt_length} tokens, the server takes {self.longest} tokens for prompt and answer"
            )
        given = "max_new_tokens" in values
        asked = self.pipeline.over({"seed": secrets.randbits(32)} | values, "the request")
        keys = asked.keys
        if given and keys.max_new_tokens > room:
            raise DataError(
                f"the prompt has {prompt_length} tokens, max_new_tokens is {keys.max_new_tokens}, the server takes "
                f"{self.longest} together: lower max_new_tokens to {room}, or shorten the prompt"
            )
        _check_temperature(keys.temperature)
        return dataclasses.replace(asked.rules, max_new_tokens=min(keys.max_new_tokens, room))

    def _filled_in(self, generation: Generation, template: Any) -> Generation:
        """The answer is a template with its blanks filled in: a list of texts and of numbers of tokens."""
        if not isinstance(template, list) or not all(type(part) in (str, int) for part in template):
            raise DataError("template must be a list of texts and, for its blanks, numbers of tokens")
        check_text(template, self.longest, "template")
        (prompt,) = generation.prompts
        blanks = sum(abs(part) for part in template if isinstance(part, int))  # fill_in refuses those below 1
        if blanks > self.longest:
            raise DataError(f"template has blanks of {blanks} tokens, the server takes {self.longest}: shorten them")
        parts, never = self.pipeline.encode_template(template), self.vocabulary.special.produced
        draft, rules = fill_in(parts, len(prompt), generation.rules, never)
        if (length := document_length(len(prompt), rules)) > self.capacity:
            raise DataError(f"prompt and template take {length} tokens, the server takes {self.capacity}: shorten them")
        return dataclasses.replace(generation, draft=draft, rules=rules)

    @property
    def capacity(self) -> int:
        """Tokens of a slot, which holds whole blocks."""
        return self.longest // self.pipeline.rules.block_size * self.pipeline.rules.block_size

    def _conversation(self, value: Any, body: dict[str, Any]) -> list[int]:
        encoder = self._encoder
        if isinstance(value, list) and len(value) > MOST_MESSAGES:
            raise DataError(f"messages has {len(value)}: a conversation has {MOST_MESSAGES} at most")
        check_text([value, body.get("tools")], self.longest, "messages with tools")
        variables = template_variables(body.get("chat_template_kwargs", {}), encoder)
        return encoder.with_variables(variables).encode_prompt(messages_of(value), tools(body.get("tools")))

    def _text_or_ids(self, value: Any, body: dict[str, Any]) -> list[int]:
        return self._text(value, body) if isinstance(value, str) else self._ids(value, body, "prompt")

    def _text(self, value: Any, body: dict[str, Any]) -> list[int]:
        encoder = self._encoder
        check_text(value, self.longest, "prompt")
        return encoder.encode_beginning(text(value, "prompt"))

    def _ids(self, value: Any, body: dict[str, Any], name: str = "prompt_ids") -> list[int]:
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise DataError(f"{name} must be a list of integers")
        return value

    @property
    def vocabulary(self) -> Vocabulary:
        return self.pipeline.vocabulary

    @property
    def _encoder(self) -> ChatEncoder:
        if self.vocabulary.encoder is None:
            raise DataError("the model directory has no tokenizer: give prompt_ids")
        return self.vocabulary.encoder


class UnknownModel(DataError):
    """Another model than the one that is served: status 404, as OpenAI has it."""


def _check_temperature(temperature: float) -> None:
    low, high = TEMPERATURES
    if temperature and not low <= temperature <= high:
        raise DataError(f"temperature {temperature:g}: it must be 0, or {low:g} to {high:g}")


def _of_type(body: dict[str, Any], name: str, kind: type, otherwise: Any = None) -> Any:
    value = body.get(name, otherwise)
    if type(value) is not kind:
        raise DataError(f"{name} is {type(value).__name__}: it must be {kind.__name__}")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and any(isinstance(s, str) and len(s) > STOP_CHARACTERS for s in stops[:MOST_STOPS]):
        raise DataError(f"a stop text has {STOP_CHARACTERS} characters at most")
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise DataError(f"stop must be text, or a list of at most {MOST_STOPS} texts, none of them empty")
    return tuple(stops)


Read = Callable[[Reader, bytes], Generation]
