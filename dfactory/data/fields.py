"""What rows become, why one can be refused, and the checks of their fields; every message names the field."""

import enum
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dfactory.data.jsonlines import Changes, plain_value
from dfactory.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = ("system", "user", "assistant", "tool")
TEXTS = (
    "content",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
)  # of a message; a template has to write them
MARKS = ("weight", "train", "training", "loss")  # 0 or false: this answer is context; OpenAI, axolotl, ms-swift
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
TEXT_PARTS = ("text", "input_text", "output_text")  # of a message's content; the last two are the Responses API's
MEDIA_PARTS = {  # what a part of another type is; as OpenAI, Anthropic and transformers call them
    **dict.fromkeys(("image", "image_url", "input_image", "image_file"), "an image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "a sound"),
    **dict.fromkeys(("video", "video_url", "input_video"), "a video"),
    **dict.fromkeys(("file", "input_file", "document"), "a file"),
}
LEAST_WEIGHT = 1e-6  # of a record: sums of smaller ones would be lost in float32
NESTING = 100  # levels of a JSON value: what walks through values and templates recurses


class Conversation(NamedTuple):
    """Messages for the chat template. Assistant turns before message number `trained_from` are only context."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    trained_from: int = 0
    weight: float = 1.0  # what the record counts in the loss; of a pair, both sides have the pair's


class Completion(NamedTuple):
    """Plain text without a template: the model reads `prompt`, which may be empty, and has to write `completion`."""

    prompt: str
    completion: str
    weight: float = 1.0


class Trace(NamedTuple):
    """How a decoder produced the response of a tokenised record.

    block size 4, prompt of 2      prompt |  block 0's rest |  block 1
    forward of the response                  0  1              2  2  3  4
    commit_step_T                  -1  -1    0  1              0  0  1  2
    on a canvas                    -1  -1    0  1              2  2  3  4
    """

    commit_step_T: np.ndarray  # int16, over prompt and response
    block_size: int
    edited: bool  # some token was replaced after it had been committed
    correct: bool | None  # whether the response was the answer, where that is known
    canvas: bool = False  # full attention: steps count over the response, and `masks_left` follow it
    masks_left: int = 0


class TokenIds(NamedTuple):
    """A tokenised record: everything after the first `prompt_length` tokens is trainable."""

    input_ids: list[int]
    prompt_length: int
    trace: Trace | None = None
    weight: float = 1.0


Document = Conversation | Completion | TokenIds


class Pair(NamedTuple):
    """A preference: two answers to one prompt."""

    chosen: Document
    rejected: Document


Record = Document | Pair


class Fault(enum.StrEnum):
    """Why a row cannot be used; the value is what reports print."""

    ENCODING = "not UTF-8"
    JSON = "not a JSON object"
    LINE = "a line too long to be a record"
    FORMAT = "unknown format"
    FIELD = "a field of the wrong type or value"
    EMPTY = "empty answer"
    NO_ANSWER = "no answer to train on"
    EQUAL_SIDES = "chosen equals rejected"
    TWO_PROMPTS = "chosen and rejected answer different prompts"
    TIE = "a tie, which prefers neither side"
    TRACE = "no decoder's trace that views can be made from"
    TEMPLATE = "refused by the chat template"
    SPECIAL_TOKEN = "special token where text should be"
    VOCABULARY = "token id outside the vocabulary"
    TOO_LONG = "longer than max_length"
    PROMPT_TOO_LONG = "prompt alone fills max_length"


class BadRow(DataError):
    """One row that cannot be used; the message names the field, the value and the rule."""

    def __init__(self, fault: Fault, message: str):
        super().__init__(message)
        self.fault = fault


def check_messages(value: Any, name: str = "messages", may_be_empty: bool = False) -> list[dict[str, Any]]:
    """A list of chat messages as templates want them: null fields dropped, text parts joined, calls of tools as objects.
    An assistant turn that is not to be trained keeps `weight` 0. Raises BadRow.

    `may_be_empty`: an assistant turn may be, as the history of a conversation has it; nothing is trained on.
    """
    messages = list_of_objects(value, name)
    return [_message(message, f"{name}[{i}]", may_be_empty) for i, message in enumerate(messages)]


def _message(message: dict[str, Any], name: str, may_be_empty: bool) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") == "function":  # OpenAI's earlier word
        message["role"] = "tool"
    role = message.get("role")
    if role not in ROLES:
        raise BadRow(Fault.FIELD, f"{name}.role is {show(role)}: it must be one of {', '.join(ROLES)}")
    _take_calls(message, name)
    calls = message.get("tool_calls")
    may_be_empty = role == "assistant" and (may_be_empty or bool(calls))
    content = _content(message.get("content", "" if may_be_empty else None), f"{name}.content")
    if role == "assistant" and not may_be_empty and not content.strip():
        raise BadRow(Fault.EMPTY, f"{name}.content is empty: an assistant turn needs text or tool_calls")
    message["content"] = content
    for key in TEXTS[1:]:
        text(message.get(key, ""), f"{name}.{key}")
    for key in MEDIA:
        if message.pop(key, None):
            raise BadRow(Fault.FIELD, f"{name}.{key}: the model reads text alone; leave the row out")
    _take_mark(message, name)
    refuse_surrogates(message, name)
    return message


def _take_mark(message: dict[str, Any], name: str) -> None:
    """Whether an answer is trained, in the one form that the encoder knows."""
    weights = {key: message.pop(key) for key in MARKS if key in message}
    for key, value in weights.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow(Fault.FIELD, f"{name}.{key} is {show(value)}: it must be 0 or 1")
    if message["role"] == "assistant" and not all(weights.values()):
        message["weight"] = 0


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a checked message is an answer to train on."""
    return message["role"] == "assistant" and message.get("weight") != 0


def sample_weight(value: Any) -> float:
    """What a record counts in the loss, 1 where it does not say. Raises BadRow."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(
            Fault.FIELD, f"weight is {show(value)}: what a record counts must be a number above 0, such as 2.0"
        )
    if not (LEAST_WEIGHT <= value <= 1 / LEAST_WEIGHT):
        raise BadRow(
            Fault.FIELD,
            f"weight is {value}: what a record counts must be above 0 and finite, from {LEAST_WEIGHT:g} to "
            f"{1 / LEAST_WEIGHT:g}; leave a record that is not to count out of the file",
        )
    return float(value)


# --- tools ------------------------------------------------------------------------------------------------------------


def _take_calls(message: dict[str, Any], name: str) -> None:
    """`tool_calls` of a message in the form that templates know; none where they are empty."""
    if "function_call" in message:  # OpenAI's earlier form
        function = message.pop("function_call")
        message.setdefault("tool_calls", [{"type": "function", "function": function}])
    calls = message.pop("tool_calls", None)
    if calls is None or calls == []:
        return
    calls = list_of_objects(calls, f"{name}.tool_calls")
    message["tool_calls"] = [_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: dict[str, Any], name: str) -> dict[str, Any]:
    """A call of a tool, in OpenAI's form or flat; its keys keep their order, which templates write."""
    if isinstance(call.get("function"), dict):
        rest = {key: value for key, value in call.items() if value is not None}
        return rest | {"function": _function(call["function"], f"{name}.function")}
    return _function(call, name) if "name" in call else _without_nulls(call, name)


def _function(function: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments that come as JSON text, as OpenAI writes them, become an object, as templates want it; none of them too."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json_object(arguments, f"{name}.arguments") if arguments.strip() not in ("", "null") else {}
    else:
        arguments = _without_nulls({} if arguments is None else arguments, f"{name}.arguments")
    return {key: value for key, value in function.items() if value is not None} | {"arguments": arguments}


def _without_nulls(value: Any, name: str) -> Any:
    """A value of JSON without the keys that are null: Arrow gives every object of a column the keys of all of them."""
    changes = Changes()
    plain = plain_value(value, name, changes)
    if lost := str(changes):
        raise BadRow(Fault.FIELD, f"{name} has values that are not JSON ({lost}): leave them out")
    return _drop_nulls(plain)


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def json_object(text: str, name: str) -> dict[str, Any]:
    """The object that a text spells. Raises BadRow."""
    try:
        value = load_json(text)
    except ValueError as problem:
        raise BadRow(Fault.FIELD, f"{name} is text but not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise BadRow(Fault.FIELD, f"{name} is {show(value)}: it must be an object")
    return value


def _content(value: Any, name: str) -> str:
    """Text, also where it comes as a list of OpenAI's {"type": "text", "text": ...} parts."""
    if not isinstance(value, list):
        return text(value, name)
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA_PARTS:
            raise BadRow(
                Fault.FIELD,
                f"{name}[{index}] is {MEDIA_PARTS[kind]} ({kind}): the model reads text alone; leave the row out",
            )
        if kind not in TEXT_PARTS:
            raise BadRow(Fault.FIELD, f"{name}[{index}] is {show(part)}: only parts of type text can be trained on")
    return "".join(text(part.get("text"), f"{name}[{index}].text") for index, part in enumerate(value))


def tools(value: Any) -> list[dict[str, Any]] | None:
    """Schemas of tools, or None. Text is JSON, since nested schemas have no common parquet type; its nulls stay."""
    if isinstance(value, str):
        try:
            value = load_json(value) if value.strip() else None
        except ValueError as problem:
            raise BadRow(Fault.FIELD, f"tools is text but not valid JSON: {problem}") from problem
    elif value:
        value = _without_nulls(list_of_objects(value, "tools"), "tools")
    if not value:
        return None
    refuse_surrogates(list_of_objects(value, "tools"), "tools")
    return value


def list_of_objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRow(Fault.FIELD, f"{name} is {show(value)}: it must be a list of objects")
    if not value:
        raise BadRow(Fault.FIELD, f"{name} is empty: it must hold at least one object")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadRow(Fault.FIELD, f"{name}[{index}] is {show(item)}: it must be an object")
    return value


def require_answer(messages: list[dict[str, Any]], name: str) -> None:
    if not any(map(is_trained, messages)):
        raise BadRow(Fault.NO_ANSWER, f"{name} has no assistant turn to train on")


def text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(Fault.FIELD, f"{name} is {show(value)}: it must be text")
    refuse_surrogates(value, name)
    return value


def answer(value: Any, name: str) -> str:
    if not text(value, name).strip():
        raise BadRow(Fault.EMPTY, f"{name} is empty: there is nothing to train on")
    return value


def answer_messages(value: Any, name: str) -> list[dict[str, Any]]:
    if value == []:
        raise BadRow(Fault.EMPTY, f"{name} is empty: there is nothing to train on")
    messages = check_messages(value, name)
    require_answer(messages, name)
    return messages


def integers(value: Any, name: str, kind: str = "token ids", may_be_empty: bool = False) -> list[int]:
    if not isinstance(value, list) or not (value or may_be_empty):
        raise BadRow(Fault.FIELD, f"{name} is {show(value)}: it must be a list of {kind}")
    for index, item in enumerate(value):
        if type(item) is not int or not 0 <= item < 2**31:
            raise BadRow(Fault.FIELD, f"{name}[{index}] is {show(item)}: it must be an integer from 0 to 2**31 - 1")
    return value


def refuse_surrogates(value: Any, name: str) -> None:
    """JSON can escape half a character (a lone surrogate), which no tokenizer can encode."""
    if isinstance(value, str):
        if not value.isascii() and SURROGATE.search(value):
            raise BadRow(Fault.ENCODING, f"{name} holds a lone surrogate (half of a character): remove it")
    elif isinstance(value, dict):
        for key, inner in value.items():
            refuse_surrogates(key, name)
            refuse_surrogates(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            refuse_surrogates(inner, f"{name}[{index}]")


def show(value: Any) -> str:
    if value is None:
        return "missing"
    text = ascii(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def load_json(text: str) -> Any:
    """The value of a JSON text. Of a repeated key in an object the last value counts, as in Python's json.

    Raises ValueError for what is not JSON, and for what is nested deeper than NESTING.
    """
    too_deep = f"nested deeper than {NESTING} levels"
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as problem:
        raise ValueError(too_deep) from problem
    if text.count("[") + text.count("{") > NESTING and _depth_exceeds(value, NESTING):
        raise ValueError(too_deep)
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [inner for item in level if isinstance(item, (dict, list)) for inner in _inner(item)]
    return any(isinstance(item, (dict, list)) for item in level)


def _inner(item: dict | list) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")
