"""Prompts of record files for a model that answers them, and the records that its answers make."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dfactory.data.chat import ChatEncoder
from dfactory.data.columns import VERDICTS, said
from dfactory.data.fields import BadRow, Completion, Conversation
from dfactory.data.prompts import FORMATS, parse_prompt, rows_of
from dfactory.data.records import parse_row
from dfactory.data.traces import TRACE_FORMATS
from dfactory.errors import DataError

REPLACED = {  # columns that held an answer, or say what one is worth: the record's answer is another
    *("completion", "response", "output", "chosen", "rejected", *VERDICTS),
    *itertools.chain.from_iterable(TRACE_FORMATS),
}


class Prompt(NamedTuple):
    number: int  # of the row, over all files
    origin: str  # file:line
    fields: dict[str, Any]  # the row as it stands there
    asked: Conversation | Completion
    ids: list[int]  # after which the model has to answer

    @property
    def said(self) -> str | list[dict[str, Any]]:
        """As TRL hands it to rewards."""
        return self.asked.messages if isinstance(self.asked, Conversation) else self.asked.prompt

    def record(self, answer: str) -> dict[str, Any]:
        """The row with this answer. Earlier answers are context, which is not trained: they are not the model's."""
        name = next(name for name in FORMATS if self.fields.get(name) is not None)
        read = {name, *FORMATS[name]} | REPLACED
        further = {column: value for column, value in self.fields.items() if column not in read}
        if isinstance(self.asked, Completion):
            return {"prompt": self.asked.prompt, "completion": answer, **further}
        context = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in self.asked.messages]
        tools = {"tools": self.asked.tools} if self.asked.tools else {}
        return {"messages": [*context, said("assistant", answer)], **tools, **further}


def read_prompts(paths: Sequence[str], encoder: ChatEncoder, system: str | None = None) -> Iterator[Prompt]:
    """Stream the prompts of all files. `system` becomes the first message of a conversation that has none of its own.
    Raises DataError that names file:line, also for a row whose record could not be trained on."""
    for number, (origin, fields) in enumerate(itertools.chain.from_iterable(map(rows_of, paths))):
        try:
            yield _prompt(number, origin, fields, encoder, system)
        except BadRow as problem:
            raise DataError(f"{origin}: {problem}") from problem


def _prompt(number: int, origin: str, fields: Any, encoder: ChatEncoder, system: str | None) -> Prompt:
    if isinstance(fields, BadRow):
        raise fields
    asked = parse_prompt(fields)
    if isinstance(asked, Completion):
        prompt = Prompt(number, origin, fields, asked, encoder.encode_beginning(asked.prompt))
    elif isinstance(asked, Conversation):
        if system is not None and asked.messages[0]["role"] != "system":
            asked = asked._replace(messages=[said("system", system), *asked.messages])
        prompt = Prompt(number, origin, fields, asked, encoder.encode_prompt(asked.messages, asked.tools))
    else:
        raise DataError(f"{origin}: prompt_ids may be another tokenizer's: give messages, or a prompt as text")
    if isinstance(bad := parse_row(prompt.record("?")), BadRow):
        raise bad
    return prompt
