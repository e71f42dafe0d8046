"""What files hold, in numbers.

    dfactory data stats FILE ... [--by COLUMN] [--html PAGE] [--json NUMBERS.json]

Columns with their types and shares, the formats that rows are read as, roles and turns, characters and words of prompts
and answers, values of columns that have few, and rows that cannot be read, by reason. Nothing is judged (`validate` does),
and no model is needed (`token-count` counts tokens). Memory: 16 bytes a document.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dfactory.config.words import RECORDS_HELP
from dfactory.console import plain_console
from dfactory.data.entries import paths_of
from dfactory.data.examples import documents_of
from dfactory.data.fields import BadRow, Completion, Conversation, Document, Pair, Record, is_trained
from dfactory.data.progress import reading
from dfactory.data.records import parse_row, read_columns
from dfactory.data_tools.command import parser_of
from dfactory.data_tools.page import Page, Section, print_page, to_html
from dfactory.data_tools.rows import SHOWN, read_all
from dfactory.errors import DataError

FEW_VALUES = 20  # of a column whose values are listed
LONGEST_VALUE = 60  # characters of one
PLAIN_WIDTH = 120  # of the output where there is no terminal
KINDS = {Conversation: "conversation", Completion: "text"}
MARKS = {"min": 0, "median": 50, "mean": None, "p90": 90, "p99": 99, "max": 100}


def main(words: list[str] | None = None) -> int:
    parser = parser_of("stats")
    parser.add_argument("files", nargs="+", help=RECORDS_HELP)
    parser.add_argument("--by", metavar="COLUMN", help="also the numbers of each value of this column")
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the page as one HTML file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    options = parser.parse_args(words)
    stats = Stats(options.by)
    with reading(paths_of(options.files)) as advance:
        for place, row in read_all(options.files, advance):
            origin = f"{options.files[place.file_index]}:{place.number}"
            stats.add(options.files[place.file_index], origin, row, options.pairs)
    page = stats.page(f"Contents of {', '.join(options.files)}")
    console = plain_console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    print_page(page, console)
    for file, text in ((options.html, to_html(page)), (options.json, stats.text())):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            console.print(f"written: {file}", soft_wrap=True)
    if not stats.kinds:
        raise DataError(f"no row of {', '.join(options.files)} can be read")
    return 0


class Lengths:
    """Characters of many texts, and their words."""

    def __init__(self) -> None:
        self.characters, self.words = array("Q"), array("Q")

    def add(self, texts: Iterable[str]) -> None:
        texts = list(texts)
        self.characters.append(sum(map(len, texts)))
        self.words.append(sum(len(text.split()) for text in texts))

    def numbers(self) -> dict[str, dict[str, float]]:
        return {"characters": _quantiles(self.characters), "words": _quantiles(self.words)}


def _quantiles(values: array) -> dict[str, float]:
    found = np.frombuffer(values, np.uint64)
    return {
        name: round(float(found.mean() if mark is None else np.percentile(found, mark)), 1)
        for name, mark in MARKS.items()
    }


class Stats:
    """Counts over rows."""

    def __init__(self, by: str | None = None):
        self.by = by
        self.files, self.kinds, self.formats = Counter[str](), Counter[str](), Counter[str]()
        self.roles, self.turns, self.refused = Counter[str](), Counter[int](), Counter[str]()
        self.with_calls = self.with_tools = 0
        self.columns: dict[str, Counter[str]] = {}  # types by column
        self.values: dict[str, Counter[str] | None] = {}  # by column; None where there are too many
        self.groups: dict[str, Counter[str]] = {}  # by value of the column `by`
        self.first_refused: list[str] = []
        self.lengths = {"prompt": Lengths(), "answer": Lengths()}

    def add(self, path: str, origin: str, row: dict[str, Any] | BadRow, pairs: bool = False) -> None:
        """A row as it stands."""
        self.files[path] += 1
        if not isinstance(row, BadRow):
            self._add_columns(row)
        record = row if isinstance(row, BadRow) else parse_row(row, pairs)
        if isinstance(record, BadRow):
            self.refused[str(record.fault)] += 1
            if len(self.first_refused) < SHOWN:
                self.first_refused.append(f"{origin}: {record}")
            return
        self.formats[
            " + ".join(name for name in row if name in read_columns(row, pairs) and row[name] is not None)
        ] += 1
        name = KINDS.get(type(documents_of(record)[0]), "token ids")
        self.kinds[f"{name} pair" if isinstance(record, Pair) else name] += 1
        self._add_texts(row, record)

    def _add_columns(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if value is None:
                continue
            self.columns.setdefault(name, Counter())[type(value).__name__] += 1
            values = self.values.setdefault(name, Counter())
            if values is not None:
                shown = value if isinstance(value, str) else str(value) if isinstance(value, (bool, int)) else None
                if shown is None or len(shown) > LONGEST_VALUE or (shown not in values and len(values) == FEW_VALUES):
                    self.values[name] = None
                else:
                    values[shown] += 1

    def _add_texts(self, row: dict[str, Any], record: Record) -> None:
        characters = 0
        for document in documents_of(record):
            prompt, answer = _texts(document)
            self.lengths["prompt"].add(prompt)
            self.lengths["answer"].add(answer)
            characters += sum(map(len, (*prompt, *answer)))
            if isinstance(document, Conversation):
                self.roles.update(message["role"] for message in document.messages)
                self.turns[sum(message["role"] == "assistant" for message in document.messages)] += 1
                self.with_calls += any(message.get("tool_calls") for message in document.messages)
                self.with_tools += bool(document.tools)
        if self.by is not None:
            group = self.groups.setdefault(str(row.get(self.by)), Counter())
            group.update(rows=1, characters=characters)

    # --- what they say ------------------------------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """All of it as plain values."""
        listed = {name: dict(values) for name, values in self.values.items() if values and _is_listed(values)}
        found = {
            "rows": dict(self.files),
            "kinds": dict(self.kinds),
            "formats": dict(self.formats),
            "refused": dict(self.refused),
            "columns": {name: dict(types) for name, types in self.columns.items()},
            "values": listed,
            "roles": dict(self.roles),
            "answers_of_a_conversation": {str(count): number for count, number in sorted(self.turns.items())},
            "conversations_with_tools": self.with_tools,
            "conversations_with_calls": self.with_calls,
        }
        if self.kinds:
            found["lengths"] = {name: lengths.numbers() for name, lengths in self.lengths.items()}
        return found | (
            {f"by {self.by}": {value: dict(group) for value, group in self.groups.items()}} if self.by else {}
        )

    def text(self) -> str:
        return json.dumps(self.numbers(), indent=1, ensure_ascii=False) + "\n"

    def page(self, title: str) -> Page:
        found, total = self.numbers(), self.files.total()
        sections = [Section("rows", [*self.files.items(), *((f"read as {k}", n) for k, n in self.kinds.most_common())])]
        sections.append(Section("formats", self.formats.most_common(FEW_VALUES)))
        columns = [
            (name, f"{types.total() / total:.1%} of the rows: {', '.join(types)}")
            for name, types in self.columns.items()
        ]
        sections.append(Section("columns", columns))
        for name, values in found["values"].items():
            sections.append(Section(f"values of {name}", Counter(values).most_common(), bars=True))
        if self.roles:
            rows = [(f"messages of {role}", count) for role, count in self.roles.most_common()]
            rows += [
                (f"conversations with {n} answer{'s' * (n != 1)}", count)
                for n, count in sorted(self.turns.items())[:FEW_VALUES]
            ]
            rows += [("conversations with tools", self.with_tools), ("conversations with calls", self.with_calls)]
            sections.append(Section("turns", rows))
        for name, lengths in found.get("lengths", {}).items():
            rows = [(unit, "  ".join(f"{mark} {value:,g}" for mark, value in v.items())) for unit, v in lengths.items()]
            sections.append(Section(f"length of the {name}", rows))
        if self.by:
            rows = [(v, f"{g['rows']:,} rows, {g['characters']:,} characters") for v, g in self.groups.items()]
            sections.append(Section(f"by {self.by}", sorted(rows)[: FEW_VALUES * 5]))
        if self.refused:
            sections.append(Section("cannot be read", self.refused.most_common(), lines=self.first_refused))
        bad = self.refused.total()
        return Page(title, sections, [], f"{total:,} rows, {bad:,} of them cannot be read", not bad)


def _is_listed(values: Counter[str]) -> bool:
    """Whether the values are those of a label: some of them repeat."""
    return values.total() > 2 * len(values)


def _texts(document: Document) -> tuple[list[str], list[str]]:
    """(texts of the prompt, texts of the answer); none of token ids."""
    if isinstance(document, Completion):
        return [document.prompt], [document.completion]
    if not isinstance(document, Conversation):
        return [], []
    sides: tuple[list[str], list[str]] = ([], [])
    for index, message in enumerate(document.messages):
        sides[index >= document.trained_from and is_trained(message)].append(message["content"])
    return sides
