"""Answers that are labelled good or bad one by one (KTO) -> preference pairs, which a stage can train on.

    {"prompt": "q", "completion": "yes", "label": true}
    {"prompt": "q", "completion": "no", "label": false}     ->  {"prompt": "q", "chosen": "yes", "rejected": "no"}

A good and a bad answer to one prompt make a pair, in the order in which they come; each is used once. Of a conversation the
label is about the last answer. Memory: the answers that wait for another one.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

from dfactory.data.columns import VERDICTS
from dfactory.data.fields import BadRow, Completion, Conversation, Fault, show
from dfactory.data.records import parse_row
from dfactory.data_tools.identity import context_key

Waiting = dict[int, deque[Any]]


class Labelled:
    """Rows with labels, as they come; what is left waits in vain."""

    def __init__(self) -> None:
        self._waiting: dict[bool, Waiting] = {True: {}, False: {}}

    @property
    def unpaired(self) -> tuple[int, int]:
        """(good answers, bad answers) that wait."""
        good, bad = (sum(map(len, self._waiting[label].values())) for label in (True, False))
        return good, bad

    def add(self, row: Any) -> Iterator[dict[str, Any]]:
        """The row of a pair, if this row completes one. Raises BadRow."""
        label, prompt, answer, tools = _read(row)
        key = context_key([prompt, tools] if isinstance(prompt, str) else [*prompt, tools])
        others = self._waiting[not label].get(key)
        if not others:
            self._waiting[label].setdefault(key, deque()).append(answer)
            return
        other = others.popleft()
        chosen, rejected = (answer, other) if label else (other, answer)
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected} | ({"tools": tools} if tools else {})
        if isinstance(bad := parse_row(pair, True), BadRow):
            raise bad
        yield pair


def _read(row: Any) -> tuple[bool, Any, Any, Any]:
    """(label, prompt, answer, tools) of a row. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    labels = {name: row[name] for name in VERDICTS if isinstance(row, dict) and row.get(name) is not None}
    if len(labels) != 1:
        raise BadRow(Fault.FIELD, f"the row has {', '.join(labels) or 'no label'}: give one of {' or '.join(VERDICTS)}")
    ((name, label),) = labels.items()
    if label not in (True, False, 0, 1):
        raise BadRow(Fault.FIELD, f"{name} is {show(label)}: it must be true or false")
    record = parse_row({column: value for column, value in row.items() if column != name})
    if isinstance(record, BadRow):
        raise record
    if isinstance(record, Completion):
        return bool(label), record.prompt, record.completion, None
    if not isinstance(record, Conversation) or record.messages[-1]["role"] != "assistant":
        raise BadRow(
            Fault.FIELD, f"{name} labels an answer: give a prompt and a completion, or messages that end with one"
        )
    return bool(label), record.messages[:-1], record.messages[-1:], record.tools
