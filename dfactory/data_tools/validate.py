"""Report on record files before anything is trained on them.

    dfactory data validate FILE ... [--model DIR] [--html PAGE]
    dfactory data validate --recipe RECIPE [key=value ...] [--html PAGE]

The rows are read, rendered, tokenised and refused by the code that training uses. With --recipe, everything comes from the
recipe, its files included. Without a model, only the rows themselves are checked. Files are streamed: memory grows by 32
bytes a row. The exit status is 1 if more of the rows are bad than --max-bad-fraction allows.
"""

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dfactory.config.data import DatasetKeys
from dfactory.config.words import RECORDS_HELP
from dfactory.console import plain_console
from dfactory.data.chat import ChatEncoder
from dfactory.data.entries import entry_of
from dfactory.data.examples import SHOWN_COLUMNS, DocumentRules, EncodedRow, read_documents
from dfactory.data.fields import BadRow, Fault, Pair
from dfactory.data.progress import Advance, reading
from dfactory.data.records import read_records
from dfactory.data_tools.command import add_vocabulary_arguments, fraction, parser_of, vocabulary_of
from dfactory.data_tools.page import Page, Section, print_page, to_html
from dfactory.data_tools.survey import Survey
from dfactory.errors import ConfigError

PLAIN_WIDTH = 120  # of the output where there is no terminal
ANY_LENGTH = 2**31 - 1
KEY = re.compile(r"[\w.]+=")


@dataclass(frozen=True)
class Task:
    """What is validated, and by which rules."""

    sources: list[DatasetKeys]
    paired: bool
    max_bad_fraction: float
    encoder: ChatEncoder | None
    rules: DocumentRules | None  # None without a model

    @property
    def files(self) -> list[str]:
        """How messages call the sources."""
        return [source.label for source in self.sources]


def main(words: list[str] | None = None) -> int:
    parser = parser_of("validate")
    parser.add_argument("files", nargs="*", metavar="FILE | key=value", help=f"{RECORDS_HELP}; keys of --recipe")
    parser.add_argument("--recipe", help="take files, model, lengths and what is allowed from this recipe")
    add_vocabulary_arguments(parser, required=False)
    parser.add_argument("--max-length", type=int, help="longest document in tokens (default: no limit)")
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=0.0,
        help="share of bad rows above which the status is 1 (default: 0)",
    )
    parser.add_argument("--html", type=Path, help="also write the report as one HTML file")
    options = parser.parse_args(words)
    overrides = [word for word in options.files if KEY.match(word) and not Path(word).exists()]
    options.files = [word for word in options.files if word not in overrides]
    if overrides and not options.recipe:
        parser.error(f"{' '.join(overrides)} would change a recipe: give --recipe")

    task = _task_of_recipe(options, overrides) if options.recipe else _task_of_words(options)
    page = report(survey(task), task)
    console = plain_console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    print_page(page, console)
    if options.html:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(to_html(page), encoding="utf-8")
        console.print(f"report: {options.html}", soft_wrap=True)
    return 0 if page.good else 1


def _task_of_words(options: argparse.Namespace) -> Task:
    if not options.files:
        raise ConfigError("no file to validate: name some, or give --recipe")
    sources = [entry_of(word) for word in options.files]
    if options.model is None:
        if options.max_length is not None or options.chat_template:
            raise ConfigError("--max-length and --chat-template need a tokenizer: give --model, such as `tiny`")
        return Task(sources, options.pairs, options.max_bad_fraction, None, None)
    vocabulary = vocabulary_of(options)
    special = vocabulary.special
    rules = DocumentRules(options.max_length or ANY_LENGTH, "refuse", special.eos, vocabulary.size, special.mask)
    return Task(sources, options.pairs, options.max_bad_fraction, vocabulary.encoder, rules)


def _task_of_recipe(options: argparse.Namespace, overrides: list[str]) -> Task:
    from dfactory.assembly import document_rules, trace_block_size_of
    from dfactory.recipe import load_recipe
    from dfactory.vocabulary import recipe_vocabulary

    if options.model or options.chat_template or options.max_length is not None:
        raise ConfigError(
            "--recipe says these already: give model_name_or_path=, chat_template_path= or max_length= instead"
        )
    recipe = load_recipe(options.recipe, overrides)
    vocabulary = recipe_vocabulary(recipe)
    allowed = recipe.max_bad_fraction if recipe.on_bad_row == "skip" else 0.0
    sources = [entry_of(word) for word in options.files] or recipe.datasets
    paired = recipe.documents_per_record == 2
    rules = document_rules(recipe, vocabulary, trace_block_size_of(recipe))
    return Task(sources, paired, allowed, vocabulary.encoder, rules)


def survey(task: Task) -> Survey:
    """Read all rows once."""
    found = Survey(task.files, task.encoder, task.rules)
    kind = None
    with reading([source.path for source in task.sources if source.path], "validating") as advance:
        for file_index, source in enumerate(task.sources):
            for row in _rows(task, source, advance, found.report.unread):
                if not isinstance(row.record, BadRow):
                    kind = isinstance(row.record, Pair) if kind is None else kind
                    row = _of_kind(row, kind)
                found.add(file_index, row)
    return found


def _rows(task: Task, source: DatasetKeys, advance: Advance, unread: Counter[str]) -> Iterator[EncodedRow]:
    records = read_records(source, task.paired, advance, unread)
    if task.rules is not None:
        return read_documents(records, source.label, task.encoder, task.rules)
    return (EncodedRow(number, record, [], []) for number, record in records)


def _of_kind(row: EncodedRow, paired: bool) -> EncodedRow:
    """A run trains on pairs or on single answers; the first row says which."""
    if isinstance(row.record, Pair) == paired:
        return row
    names = ("a preference pair", "a single answer")
    this, first = names if isinstance(row.record, Pair) else reversed(names)
    return row._replace(
        record=BadRow(Fault.FORMAT, f"the row is {this}, the first one was {first}: give one kind only")
    )


# --- the report -------------------------------------------------------------------------------------------------------


def report(found: Survey, task: Task) -> Page:
    sections = [_rows_section(found)]
    if found.report.refused:
        sections += [_refused_section(found)]
    if task.rules is not None and len(found.length_D):
        sections += [_tokens_section(found, task.rules.max_length), _length_section(found)]
    sections += [_turns_section(found)] if found.roles else []
    if found.spelt:
        rows = [
            (f"{literal}   first at {found.first_spelt[literal]}", count)
            for literal, count in found.spelt.most_common()
        ]
        sections += [Section("special tokens spelt out in texts (they stay text)", rows)]
    good = found.bad_share <= task.max_bad_fraction and found.report.num_refused < found.num_rows
    share = f"{found.report.num_refused:,} of {found.num_rows:,} rows are bad ({found.bad_share:.2%})"
    verdict = f"{share}, {task.max_bad_fraction:.2%} are allowed"
    return Page(f"Records of {', '.join(task.files)}", sections, _warnings(found, task), verdict, good)


def _rows_section(found: Survey) -> Section:
    repeated, examples = found.duplicates()
    rows = [("files", len(found.files)), ("rows", found.num_rows), ("refused", found.report.num_refused)]
    rows += [(f"read as {kind}", count) for kind, count in found.kinds.most_common()]
    rows += [("different prompts", found.num_prompts), ("duplicates", repeated)]
    rows += [("left out by trace_filter", found.left_out)] if found.left_out else []
    return Section("rows", rows, lines=examples)


def _refused_section(found: Survey) -> Section:
    ordered = sorted(found.report.refused.items(), key=lambda item: -item[1].count)
    rows = [(str(fault), refused.count) for fault, refused in ordered]
    return Section("refused", rows, lines=[origin for _, refused in ordered for origin in refused.first])


def _tokens_section(found: Survey, max_length: int) -> Section:
    length_D = found.length_D.astype(np.int64)
    total = int(length_D.sum())
    rows = [
        ("tokens", f"{total:,}"),
        ("trainable", f"{found.trainable_tokens:,} ({found.trainable_tokens / total:.1%})"),
        ("a document", " ".join(f"{name} {int(value):,}" for name, value in _quantiles(length_D))),
    ]
    if max_length < ANY_LENGTH:
        over_D = length_D[length_D > max_length] - max_length
        share = f"{len(over_D):,} documents ({len(over_D) / len(length_D):.2%}), {int(over_D.sum()):,} tokens beyond it"
        rows.append((f"longer than max_length {max_length:,}", share))
    return Section("tokens", rows)


def _quantiles(length_D: np.ndarray) -> list[tuple[str, float]]:
    marks = {"min": 0, "median": 50, "mean": None, "p90": 90, "p99": 99, "max": 100}
    return [(n, length_D.mean() if mark is None else np.percentile(length_D, mark)) for n, mark in marks.items()]


def _length_section(found: Survey) -> Section:
    """Powers of two, and between them."""
    length_D = found.length_D
    edges = sorted({1, *(int(2 ** (half / 2)) for half in range(63))})
    first = max(0, int(np.searchsorted(edges, length_D.min(), "right")) - 1)
    edges = edges[first : int(np.searchsorted(edges, length_D.max(), "right")) + 1]
    count = np.histogram(length_D, edges)[0]
    names = [f"{low:,} to {high - 1:,}" for low, high in itertools.pairwise(edges)]
    return Section("documents by length in tokens", list(zip(names, count.tolist(), strict=True)), bars=True)


def _turns_section(found: Survey) -> Section:
    rows = [(f"messages of {role}", count) for role, count in found.roles.most_common()]
    turns = found.turns.most_common()
    rows += [(f"conversations with {count} answer{'s' * (count != 1)}", number) for count, number in sorted(turns)[:6]]
    rows += [("conversations with more", sum(number for _, number in sorted(turns)[6:]))] if len(turns) > 6 else []
    return Section("turns", [*rows, ("conversations with tools", found.with_tools)])


def _warnings(found: Survey, task: Task) -> list[str]:
    warnings = [
        f"{name} is text that nobody reads, in {count / found.num_rows:.1%} of the rows"
        for name, count in found.report.unread.most_common(SHOWN_COLUMNS)
    ]
    repeated, _ = found.duplicates()
    if repeated:
        warnings.append(f"{repeated:,} rows repeat an earlier one: `dfactory data dedup` leaves them out")
    if found.report.refused.get(Fault.TOO_LONG):
        warnings.append(
            "rows are longer than max_length: raise it, or set overlong: truncate in the recipe (they get no EOS)"
        )
    if task.rules is None:
        warnings.append("no --model was given: nothing is said of tokens, and no row was put through a chat template")
    return warnings
