"""Columns next to the turns of a row: which are read, which are refused by name, which are only reported.

read          system, system_prompt: the first message           history: earlier [question, answer] pairs
              input, context: after the instruction              tools
              weight: what the record counts in the loss, 1 without it
refused       one of these where the format does not read it and its text is not in the turns; images and the like;
              a verdict that the answer is bad
reported      any other text, once, with its share of the rows
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dfactory.data import fields
from dfactory.data.fields import MARKS, BadRow, Completion, Conversation, Fault, Pair, Record, TokenIds

SYSTEM = ("system", "system_prompt")
EXTRA = ("input", "context")
ASKED = (*SYSTEM, *EXTRA, "history", "tools")  # columns that are read with an instruction
CONTENT = (*SYSTEM, *EXTRA, "history", "documents")  # they belong to a conversation
UNSUPPORTED = {
    **dict.fromkeys(
        ("images", "image", "videos", "video", "audios", "audio"), "the model reads text alone: leave the row out"
    ),
    "tools": "plain text has no place for them: give messages",
    "functions": "rename the column to tools",
    "chat_template_kwargs": "give a template with these options set as chat_template_path",
}
WEIGHT = "weight"
VERDICTS = ("label", "kto_tag")  # of KTO: false marks a bad answer
READ_OF_MESSAGES = {
    *("role", "content", "name", "id", "type", "tool_calls", "tool_call_id", "function_call", "from", "value"),
    *MARKS,
    *fields.TEXTS,
}


class Format(NamedTuple):
    """A reader of rows that have certain columns."""

    read: Callable[[dict], Record]
    also: tuple[str, ...] = ()  # further columns that it reads
    strict: bool = True  # whether further content is refused; token ids and plain text are complete by themselves


# --- read -------------------------------------------------------------------------------------------------------------


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def with_system(row: dict, messages: list[dict]) -> list[dict]:
    """The messages, with the system prompt of its own column in front."""
    stated = {name: fields.text(row[name], name) for name in SYSTEM if row.get(name)}
    stated = {name: text for name, text in stated.items() if text.strip()}
    if len({_bare(text) for text in stated.values()}) > 1:
        raise BadRow(Fault.FIELD, "system and system_prompt differ: keep one")
    for name, text in stated.items():
        if not messages or messages[0]["role"] != "system":
            return [said("system", text), *messages]
        if _bare(messages[0]["content"]) != _bare(text):
            shown = fields.show(messages[0]["content"])
            raise BadRow(
                Fault.FIELD, f"{name} is {fields.show(text)}, but the first message is the system's {shown}: keep one"
            )
    return messages


def asked(row: dict, name: str) -> list[dict]:
    """System prompt, earlier turns, and the question with its input or context."""
    question = fields.text(row[name], name)
    extras = [fields.text(row[extra], extra) for extra in EXTRA if row.get(extra)]
    if len(extras) > 1:
        raise BadRow(Fault.FIELD, "the row has input and context: join them, or leave one out")
    text = "\n".join(part for part in (question, *extras) if part)
    return with_system(row, [*_history(row), said("user", text)])


def _history(row: dict) -> Iterator[dict]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow(Fault.FIELD, f"history is {fields.show(history)}: it must be a list of [question, answer]")
    for index, (question, answer) in enumerate(history):
        yield said("user", fields.text(question, f"history[{index}][0]"))
        yield said("assistant", fields.answer(answer, f"history[{index}][1]"))


SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant"},
}


def sharegpt_messages(value: Any, name: str) -> list[dict]:
    """ShareGPT's turns {from, value} as messages; calls of tools are turns of the speaker function_call. Raises BadRow."""
    turns = fields.list_of_objects(value, name)
    if all("role" in turn for turn in turns):
        return fields.check_messages(turns, name)
    return fields.check_messages([_turn(turn, f"{name}[{index}]") for index, turn in enumerate(turns)], name)


def _turn(turn: dict, name: str) -> dict:
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise BadRow(Fault.FIELD, f"{name}.from is {fields.show(speaker)}: it must be one of {known}")
    message = {key: inner for key, inner in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        function = fields.json_object(fields.text(value, f"{name}.value"), f"{name}.value")
        return {**message, **said("assistant", ""), "tool_calls": [{"type": "function", "function": function}]}
    return {**message, **said(SPEAKERS[speaker], fields.text(value, f"{name}.value"))}


def weighed(row: dict, record: Record) -> Record:
    """The record with the weight of its own column. Raises BadRow."""
    weight = fields.sample_weight(row.get(WEIGHT))
    if weight == 1:
        return record
    if isinstance(record, Pair):
        return Pair(*(side._replace(weight=weight) for side in record))
    return record._replace(weight=weight)


# --- refused ----------------------------------------------------------------------------------------------------------


def refuse_unread(row: dict, read: Iterable[str], record: Record, content: Iterable[str] = CONTENT) -> None:
    """Raises BadRow for a column whose content the record should have and has not."""
    rest = {name: value for name, value in row.items() if name not in read and is_stated(value)}
    for name in (name for name in content if name in rest):
        if not isinstance(rest[name], str) or _bare(rest[name]) not in _bare(" ".join(texts_of(record))):
            raise BadRow(
                Fault.FIELD,
                f"the row has `{name}` {fields.show(rest[name])}, which is in none of its turns and would be left out: put "
                "it into them, or remove the column",
            )
    for name, remedy in UNSUPPORTED.items():
        if name in rest:
            raise BadRow(Fault.FIELD, f"the row has `{name}`, which would be left out: {remedy}")


def refuse_bad_answer(row: dict, record: Record) -> None:
    """Raises BadRow for a single answer that the row itself calls bad."""
    for name in VERDICTS if not isinstance(record, Pair) else ():
        if row.get(name) is False or (row.get(name) == 0 and "completion" in row):
            raise BadRow(
                Fault.FIELD,
                f"{name} is false: a bad answer (KTO), which no stage trains on; leave the row out, or make pairs "
                "of such rows (`dfactory data convert --pair-labels`)",
            )


def refuse_beside_text(row: dict) -> None:
    """Raises BadRow for what plain text, without a template, has no place for."""
    for name in (*SYSTEM, "tools"):
        if is_stated(row.get(name)):
            raise BadRow(
                Fault.FIELD,
                f"the row has `{name}` beside plain text, where it would be left out: give messages instead",
            )


def is_stated(value: Any) -> bool:
    """Whether a column says anything: no null, no blank text, nothing empty."""
    return bool(value.strip() if isinstance(value, str) else value)


def texts_of(record: Record) -> Iterator[str]:
    """All texts of a record."""
    for document in record if isinstance(record, Pair) else (record,):
        if isinstance(document, Completion):
            yield from (document.prompt, document.completion)
        elif isinstance(document, Conversation):
            yield from (message["content"] for message in document.messages)


def _bare(text: str) -> str:
    """The text without its white space."""
    return "".join(text.split())


# --- reported ---------------------------------------------------------------------------------------------------------


def unread_texts(row: dict, read: Iterable[str]) -> set[str]:
    """Names of columns, and of fields of messages, that hold text and are not read."""
    names = {name for name, value in row.items() if name not in read and isinstance(value, str) and value.strip()}
    for name in read:
        turns = row.get(name)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and not turn.keys() <= READ_OF_MESSAGES:
                further = (
                    key for key in turn.keys() - READ_OF_MESSAGES if isinstance(turn[key], str) and turn[key].strip()
                )
                names.update(f"{name}[].{key}" for key in further)
    return names


def refuse_other_labels(row: dict, record: TokenIds) -> None:
    """Columns that say which tokens count have to say what prompt_lengths says."""
    for name, wrong, rule in (
        ("attention_mask", lambda index, value: value != 1, "padding is added here: leave it out of the file"),
        (
            "labels",
            lambda index, value: (value == -100) != (index < record.prompt_length),
            "prompt_lengths says otherwise",
        ),
    ):
        values = row.get(name)
        for index, value in enumerate(values if isinstance(values, list) else ()):
            if wrong(index, value):
                raise BadRow(Fault.FIELD, f"{name}[{index}] is {fields.show(value)}: {rule}")
