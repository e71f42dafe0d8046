"""What the keys of an entry of `datasets` change in its rows, before a reader sees them.

    rename_columns   {theirs: ours}: columns get the names that the readers know
    tool_calls       parse: calls that a text spells out become `tool_calls`, which the chat template writes in its own form
    system_prompt    takes the place of each record's system message
    trained_turns    last: answers before the last one become context, `weight: 0`
    reasoning        tags, field or strip: what an answer says in <think>...</think>, or in a field of its own

Without one of these keys a row passes as it is. Readers, prompts and data tools all get the rows that come out.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from dfactory.config.data import DatasetKeys
from dfactory.data import fields, spelt_calls
from dfactory.data.columns import SYSTEM
from dfactory.data.fields import BadRow, Fault, show

TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")  # columns that may hold turns
ANSWERS = ("completion", "response", "output", "answer", "chosen", "rejected")  # those that hold an answer as text
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message, the first one that of templates
THOUGHT = re.compile(r"\s*(?:<(think|thinking)>)?(.*?)</(think|thinking)>\s*", re.DOTALL)
OPENS, CLOSES = ("<think>", "<thinking>"), ("</think>", "</thinking>")
ASSISTANT, USER, TOOL = ("assistant", "gpt"), ("user", "human"), ("tool", "observation", "function_response")

Rewrite = Callable[[Any], Any]


def rewriter(entry: DatasetKeys) -> Rewrite:
    """row -> the row that is read, or a BadRow. What is no object passes as it is."""
    steps: list[Rewrite] = []
    if entry.rename_columns:
        steps.append(lambda row: _renamed(row, entry.rename_columns))
    if entry.reasoning != "keep":
        steps.append(lambda row: _with_reasoning(row, entry.reasoning))
    if entry.tool_calls == "parse":
        steps.append(_with_calls)
    if entry.system_prompt is not None:
        steps.append(lambda row: _with_system(row, entry.system_prompt))
    if entry.trained_turns == "last":
        steps.append(_with_last_answer)
    return (lambda row: _rewritten(row, steps)) if steps else (lambda row: row)


def changes_of(entry: DatasetKeys) -> str:
    """The keys by which an entry changes its rows, as text; empty where it changes none."""
    untouched = DatasetKeys()
    names = ("rename_columns", "tool_calls", "reasoning", "system_prompt", "trained_turns")
    return "".join(f"{n}={getattr(entry, n)};" for n in names if getattr(entry, n) != getattr(untouched, n))


def _rewritten(row: Any, steps: list[Rewrite]) -> Any:
    try:
        for step in steps:
            row = step(row) if isinstance(row, dict) else row
    except BadRow as bad:
        return bad
    return row


def _renamed(row: dict, names: dict[str, str]) -> dict:
    """A null counts as absent, as everywhere."""
    taken = {name: value for name, value in row.items() if name not in names}
    for theirs, ours in names.items():
        if row.get(theirs) is None:
            continue
        if taken.get(ours) is not None:
            raise BadRow(
                Fault.FIELD, f"rename_columns makes {ours} of {theirs}, but the row has {ours}: rename that one too"
            )
        taken[ours] = row[theirs]
    return taken


# --- turns ------------------------------------------------------------------------------------------------------------


def _with_turns(row: dict, change: Callable[[dict, str, str], list[dict]]) -> dict:
    """The row with what `change` makes of every turn: (turn, its text, how messages call it) -> turns."""
    changed = dict(row)
    for column in TURNS:
        turns = row.get(column)
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            changed[column] = [new for i, turn in enumerate(turns) for new in _changed(turn, f"{column}[{i}]", change)]
    return changed


def _changed(turn: dict, name: str, change: Callable[[dict, str, str], list[dict]]) -> list[dict]:
    content = turn.get(_content_key(turn))
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        return [turn]  # a reader refuses it
    return change(turn, content or "", f"{name}.{_content_key(turn)}")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in fields.TEXT_PARTS and isinstance(part.get("text"), str)


def _content_key(turn: dict) -> str:
    return "value" if "from" in turn and "role" not in turn else "content"


def _is_from(turn: dict, speakers: tuple[str, ...]) -> bool:
    return turn.get("role", turn.get("from")) in speakers


def _with_system(row: dict, prompt: str) -> dict:
    """The row with this system message alone, or with none for an empty text."""
    row = _with_turns(row, lambda turn, text, name: [] if _is_from(turn, ("system",)) else [turn])
    row = {name: value for name, value in row.items() if name not in SYSTEM}
    return {**row, "system": prompt} if prompt else row


def _with_last_answer(row: dict) -> dict:
    """The row with all answers but the last one marked as context."""
    changed = dict(row)
    for column in ("messages", "conversations", "completion"):
        turns = row.get(column)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            continue
        answers = [i for i, turn in enumerate(turns) if _is_from(turn, ASSISTANT)]
        context = set(answers[:-1])
        changed[column] = [{**turn, "weight": 0} if i in context else turn for i, turn in enumerate(turns)]
    return changed


# --- reasoning --------------------------------------------------------------------------------------------------------


def _with_reasoning(row: dict, form: str) -> dict:
    row = _with_turns(row, lambda turn, text, name: [_reasoned(turn, text, name, form)])
    for column in ANSWERS if form == "strip" else ():
        if isinstance(row.get(column), str):
            row[column] = _answer_after(row[column], column)
    return row


def _reasoned(turn: dict, text: str, name: str, form: str) -> dict:
    if not _is_from(turn, ASSISTANT):
        return turn
    thought, answer = _cut(text, name)
    in_fields = [turn[key] for key in REASONING if _said(turn, key)]
    if thought and in_fields:
        raise BadRow(Fault.FIELD, f"{name} has <think>, and the turn a field of reasoning too: keep one")
    thought = thought or (in_fields[0].strip() if in_fields else "")
    if not thought and answer == text:
        return turn
    without = {key: value for key, value in turn.items() if key not in REASONING}
    if form == "tags" and thought:
        answer = f"<think>\n{thought}\n</think>\n\n{answer}"
    further = {REASONING[0]: thought} if form == "field" and thought else {}
    return {**without, _content_key(turn): answer, **further}


def _said(turn: dict, key: str) -> str:
    """What a turn says in a field; no text where the field holds something else, which a reader refuses."""
    value = turn.get(key)
    return value.strip() if isinstance(value, str) else ""


def _answer_after(text: str, name: str) -> str:
    answer = _cut(text, name)[1]
    return fields.answer(answer, f"{name}, without its reasoning,") if answer != text else text


def _cut(text: str, name: str) -> tuple[str, str]:
    """(reasoning, answer) of a text. A chat template may have written the opening tag, which is then not in the text."""
    opens = text.lstrip().startswith(OPENS)
    closing = next((tag for tag in CLOSES if tag in text), None)
    if closing is None:
        if opens:
            raise BadRow(Fault.FIELD, f"{name} is {show(text)}: <think> has no end; leave the row out, or mend it")
        return "", text
    before = text[: text.index(closing)]
    if not opens and any(tag in before for tag in OPENS):
        return "", text  # further inside: part of the answer
    found = THOUGHT.match(text)
    return found[2].strip(), text[found.end() :]


# --- calls of tools ---------------------------------------------------------------------------------------------------


def _with_calls(row: dict) -> dict:
    stated = fields.tools(row.get("tools"))
    found: list[dict[str, Any]] = []
    row = _with_turns(row, lambda turn, text, name: list(_without_announcement(turn, text, name, found)))
    if found and stated is not None and _bare(stated) != _bare(found):
        raise BadRow(Fault.FIELD, "the system message announces other tools than the column tools: keep one of them")
    schemas = stated or found
    row = _with_turns(row, lambda turn, text, name: _called(turn, text, name, schemas))
    return row | {"tools": schemas} if schemas else row


def _bare(tools: list[dict[str, Any]]) -> list[Any]:
    return [tool.get("function", tool) for tool in tools]


def _without_announcement(turn: dict, text: str, name: str, found: list[dict[str, Any]]) -> Iterator[dict]:
    if not _is_from(turn, ("system",)):
        yield turn
        return
    rest, tools = spelt_calls.tools_in(text, name)
    found.extend(tools)
    if rest or not tools:
        yield {**turn, _content_key(turn): rest} if tools else turn


def _called(turn: dict, text: str, name: str, tools: list[dict[str, Any]]) -> list[dict]:
    key = _content_key(turn)
    if _is_from(turn, ASSISTANT):
        rest, calls = spelt_calls.calls_in(text, name, tools)
        if calls and turn.get("tool_calls"):
            raise BadRow(Fault.FIELD, f"{name} spells calls, and the turn has tool_calls too: keep one of them")
        return [{**turn, key: rest, "tool_calls": calls}] if calls else [turn]
    responses = spelt_calls.responses_in(text, name) if _is_from(turn, (*USER, *TOOL)) else None
    if responses is None:
        return [turn]
    speaker = "from" if key == "value" else "role"
    return [{**turn, speaker: "tool", key: response} for response in responses]
