"""Tokens of files: what they cost in training, before anything is trained.

    dfactory data token-count FILE ... --model DIR [--by COLUMN] [--json COUNTS.json]

Rows are rendered and tokenised as training does it, with the EOS that it adds. Trained tokens are those of the answers. A
row that cannot be read or tokenised is counted by its reason. With --json the counts are kept as the work goes on:
interrupted work goes on with the same command (SIGINT: status 130, SIGTERM: 75), and ends with the same numbers.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfactory.config.words import RECORDS_HELP
from dfactory.console import plain_console
from dfactory.data.entries import paths_of
from dfactory.data.examples import DocumentRules, read_documents
from dfactory.data.fields import BadRow
from dfactory.data.progress import reading
from dfactory.data.records import parse_row
from dfactory.data_tools.command import add_vocabulary_arguments, parser_of, say, vocabulary_of
from dfactory.data_tools.identity import content_of
from dfactory.data_tools.interrupts import status_of, terminable
from dfactory.data_tools.page import Page, Section, print_page
from dfactory.data_tools.rows import Place, read_all
from dfactory.data_tools.sample import MOST_VALUES, value_of
from dfactory.errors import ConfigError, DataError
from dfactory.vocabulary import Vocabulary

ROWS = 2048  # that are tokenised at once; the counts are kept after each
ANY_LENGTH = 2**31 - 1
NAMES = ("rows", "documents", "tokens", "trained", "longest")
FILE = ""  # in place of a column's name
PLAIN_WIDTH = 120  # of the output where there is no terminal


def main(words: list[str] | None = None) -> int:
    parser = parser_of("token-count")
    parser.add_argument("files", nargs="+", help=RECORDS_HELP)
    add_vocabulary_arguments(parser, required=True)
    parser.add_argument("--by", metavar="COLUMN", help="also count each value of this column")
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the counts here")
    options = parser.parse_args(words)
    counts = Counts.of(options)
    if not counts.is_finished:
        try:
            with terminable():
                count(counts, options, vocabulary_of(options))
        except KeyboardInterrupt as interrupt:
            kept = f"; the same command goes on from {options.json}" if options.json else ""
            say(f"interrupted after {sum(counts.total('rows')):,} rows{kept}")
            return status_of(interrupt)
    console = plain_console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    print_page(counts.page(), console)
    return 0


def count(counts: "Counts", options: argparse.Namespace, vocabulary: Vocabulary) -> None:
    special = vocabulary.special
    rules = DocumentRules(ANY_LENGTH, "refuse", special.eos, vocabulary.size, special.mask)
    with reading(paths_of(options.files), "counting") as advance:
        rows = read_all(options.files, advance, counts.place)
        for index, group in itertools.groupby(rows, key=lambda row: row[0].file_index):
            while batch := list(itertools.islice(group, ROWS)):
                _count(counts, batch, options, vocabulary, rules, options.files[index])
                counts.place = batch[-1][0]
                counts.save()
    counts.is_finished = True
    counts.save()


def _count(
    counts: "Counts", batch: list, options: argparse.Namespace, vocabulary: Vocabulary, rules, path: str
) -> None:
    records = [
        (place.number, row if isinstance(row, BadRow) else parse_row(row, options.pairs)) for place, row in batch
    ]
    for (_, row), found in zip(batch, read_documents(iter(records), path, vocabulary.encoder, rules), strict=True):
        if isinstance(found.finished, BadRow):
            counts.refuse(found.finished)
            continue
        lengths = [(len(document.tokens[0]), int(document.tokens[1].sum())) for document in found.finished]
        counts.add((FILE, path), lengths)
        if options.by is not None:
            counts.add((options.by, value_of(row, options.by)), lengths)


class Counts:
    """Numbers by group, and how far they go."""

    def __init__(self, settings: dict[str, Any], file: Path | None):
        self.settings, self.file = settings, file
        self.groups: dict[tuple[str, str], dict[str, int]] = {}
        self.refused: dict[str, int] = {}
        self.place: Place | None = None
        self.is_finished = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Counts":
        """Empty, or what an interrupted command has kept. Raises ConfigError where that counts something else."""
        names = ("files", "model", "chat_template", "mask_token_id", "eos_token_id", "by", "pairs")
        counts = cls(
            {name: getattr(options, name) for name in names} | {"contents": list(map(content_of, options.files))},
            options.json,
        )
        if options.json is None or not options.json.is_file():
            return counts
        try:
            stored = json.loads(options.json.read_text(encoding="utf-8"))
            settings, groups = stored["settings"], stored["groups"]
            counts.refused, counts.is_finished = stored["refused"], stored["is_finished"]
            counts.groups = {(group.pop("of"), group.pop("value")): group for group in groups}
            counts.place = Place(*stored["place"]) if stored["place"] else None
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise DataError(
                f"--json {options.json} holds no counts ({problem}): remove it, or name another"
            ) from problem
        for name, value in counts.settings.items():
            if settings.get(name) != value:
                raise ConfigError(
                    f"--json {options.json} counts with {name} {settings.get(name)}, and is now asked for with {value}: "
                    "remove it, or name another"
                )
        return counts

    def add(self, group: tuple[str, str], lengths: list[tuple[int, int]]) -> None:
        """A row with the (tokens, trained tokens) of its documents."""
        numbers = self.groups.setdefault(group, dict.fromkeys(NAMES, 0))
        if len(self.groups) > MOST_VALUES:
            raise ConfigError(f"--by {group[0]} has more than {MOST_VALUES:,} values: name a column with fewer")
        numbers["rows"] += 1
        numbers["documents"] += len(lengths)
        numbers["tokens"] += sum(tokens for tokens, _ in lengths)
        numbers["trained"] += sum(trained for _, trained in lengths)
        numbers["longest"] = max(numbers["longest"], *(tokens for tokens, _ in lengths))

    def refuse(self, bad: BadRow) -> None:
        self.refused[str(bad.fault)] = self.refused.get(str(bad.fault), 0) + 1

    def total(self, name: str) -> Iterator[int]:
        return (numbers[name] for (of, _), numbers in self.groups.items() if of == FILE)

    def save(self) -> None:
        """All at once."""
        if self.file is None:
            return
        groups = [{"of": of, "value": value, **numbers} for (of, value), numbers in self.groups.items()]
        stored = {"settings": self.settings, "groups": groups, "refused": self.refused}
        stored |= {"place": self.place, "is_finished": self.is_finished}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f"{self.file.name}.partial")
        partial.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.file)

    def page(self) -> Page:
        sections = []
        for of in dict.fromkeys(of for of, _ in self.groups):
            rows = [(value, _told(numbers)) for (kind, value), numbers in self.groups.items() if kind == of]
            sections.append(Section(f"tokens by {of or 'file'}", rows))
        if self.refused:
            sections.append(Section("refused rows", sorted(self.refused.items(), key=lambda item: -item[1])))
        tokens, trained, rows = (sum(self.total(name)) for name in ("tokens", "trained", "rows"))
        verdict = (
            f"{tokens:,} tokens, {trained:,} of them trained, in {rows:,} rows; {sum(self.refused.values()):,} refused"
        )
        return Page("Tokens", sections, [], verdict, bool(tokens))


def _told(numbers: dict[str, int]) -> str:
    mean = numbers["tokens"] / max(numbers["documents"], 1)
    return (
        f"{numbers['tokens']:,} tokens, {numbers['trained']:,} trained; {numbers['documents']:,} documents, "
        f"mean {mean:,.1f}, longest {numbers['longest']:,}"
    )
