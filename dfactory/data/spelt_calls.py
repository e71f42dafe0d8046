"""Calls of tools that a text spells out, as Hermes's and Qwen's templates write them, read back into calls.

    <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>      Hermes, Qwen 2.5, Qwen 3
    <tool_call><function=weather><parameter=city>Oslo</parameter></function></tool_call>      Qwen 3 Coder
    <tool_response>rain</tool_response>      what came back, in a turn of the tool or of the user
    <tools>[...]</tools>      the schemas, in the system message, with the sentences that go with them

An object may be JSON or a Python literal, as Hermes's published records have it. What is not one of these forms, or stands
where a template could not write it back, is a BadRow.
"""

import ast
import json
import re
from typing import Any

from dfactory.data.fields import BadRow, Fault, load_json, show

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
FUNCTION = re.compile(r"<function=([^<>]+)>(.*?)</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^<>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
SECTIONS = (  # of system messages: what announces the tools; `tools` are their schemas
    re.compile(  # Qwen 2.5 and Qwen 3
        r"\s*# Tools\s+You may call one or more functions to assist with the user query\.\s+You are provided with function "
        r"signatures within <tools></tools> XML tags:\s*<tools>(?P<tools>.*?)</tools>\s*For each function call, return a "
        r"json object with function name and arguments within <tool_call></tool_call> XML tags:\s*<tool_call>[^<]*"
        r"<function-name>[^<]*<args-json-object>[^<]*</tool_call>",
        re.DOTALL,
    ),
    re.compile(  # Hermes
        r"\s*You are a function calling AI model\. You are provided with function signatures within <tools>\s*</tools> XML "
        r"tags\.[^<]*<tools>(?P<tools>.*?)</tools>.*?within <tool_call>\s*</tool_call>.*?"
        r"<tool_call>(?:(?!</tool_call>).)*</tool_call>",
        re.DOTALL,
    ),
)
LONGEST_LITERAL = 1 << 16  # characters of a Python literal: its parser recurses


def calls_in(text: str, name: str, tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(the text before the calls, the calls in OpenAI's form) of an answer. Raises BadRow."""
    found = list(CALL.finditer(text))
    if text.count("<tool_call>") != len(found) or text.count("</tool_call>") != len(found):
        raise BadRow(
            Fault.FIELD, f"{name} has <tool_call> without </tool_call>, or the reverse: mend it, or leave it out"
        )
    if not found:
        return text, []
    between = CALL.sub("", text[found[0].start() :]).strip()
    if between:
        raise BadRow(
            Fault.FIELD,
            f"{name} has {show(between)} after a call, and templates write text first: move it there, or set "
            "tool_calls: text",
        )
    calls = [call for match in found for call in _calls(match[1].strip(), name, tools)]
    return text[: found[0].start()].rstrip(), [{"type": "function", "function": call} for call in calls]


def responses_in(text: str, name: str) -> list[str] | None:
    """What tools answered, where that is all that a text holds; None for another text. Raises BadRow."""
    found = RESPONSE.findall(text)
    if not found and "<tool_response>" not in text:
        return None
    if RESPONSE.sub("", text).strip() or text.count("<tool_response>") != len(found):
        raise BadRow(
            Fault.FIELD, f"{name} has text beside <tool_response>: give that a turn of its own, or set tool_calls: text"
        )
    return [response.strip("\n") for response in found]


def tools_in(text: str, name: str) -> tuple[str, list[dict[str, Any]]]:
    """(the text without the announcement of tools, the schemas) of a system message. Raises BadRow."""
    for section in SECTIONS:
        if found := section.search(text):
            rest = text[: found.start()] + text[found.end() :]
            return rest.strip(), _objects(found["tools"].strip(), f"{name}, in <tools>")
    if "<tools>" in text:
        raise BadRow(
            Fault.FIELD,
            f"{name} announces tools in other words than Hermes's or Qwen's: move them to the column tools, or set "
            "tool_calls: text",
        )
    return text, []


def _calls(body: str, name: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if body.startswith("<function="):
        if FUNCTION.sub("", body).strip():
            raise BadRow(Fault.FIELD, f"{name}: {show(body)} is no <function=...>...</function>")
        return [_of_tags(*match.groups(), name, tools) for match in FUNCTION.finditer(body)]
    calls = _objects(body, f"{name}, in <tool_call>")
    for call in calls:
        if not isinstance(call.get("name"), str) or not call.keys() <= {"name", "arguments", "id"}:
            raise BadRow(
                Fault.FIELD, f"{name}: the call {show(call)} must have `name` and `arguments`, and nothing else"
            )
    return calls


def _of_tags(function: str, body: str, name: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """A call whose arguments are tags; the schema says which of them are no text."""
    if PARAMETER.sub("", body).strip():
        raise BadRow(Fault.FIELD, f"{name}: {show(body)} holds more than <parameter=...>...</parameter>")
    declared = (tool.get("function", tool) for tool in tools)
    schema = next((tool.get("parameters") or {} for tool in declared if tool.get("name") == function), {})
    types = {key: value.get("type") for key, value in schema.get("properties", {}).items() if isinstance(value, dict)}
    arguments = {}
    for key, value in PARAMETER.findall(body):
        is_text = types.get(key, "string") == "string"
        arguments[key] = value if is_text else _value(value, f"{name}, parameter {key} of {function}")
    return {"name": function, "arguments": arguments}


def _value(text: str, name: str) -> Any:
    try:
        return load_json(text)
    except ValueError:
        pass
    try:
        if len(text) > LONGEST_LITERAL:
            raise ValueError("it is too long to be one")
        value = ast.literal_eval(text)
        json.dumps(value)
        return value
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as problem:
        raise BadRow(Fault.FIELD, f"{name}: {show(text)} is neither JSON nor a Python literal ({problem})") from problem


def _objects(text: str, name: str) -> list[dict[str, Any]]:
    """An object, a list of objects, or objects on lines of their own."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        values = _value(text, name)
    except BadRow:
        if len(lines) < 2:
            raise
        values = [_value(line.strip(), name) for line in lines]
    values = [values] if isinstance(values, dict) else values
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise BadRow(Fault.FIELD, f"{name}: {show(text)} is no object, and no list of objects")
    return values
