"""Leave out records that hold the questions of evaluation files.

    dfactory data decontaminate FILE ... --against EVAL ... --output CLEAN.jsonl [--removed REMOVED.jsonl]

A record is left out if it holds at least --overlap of the runs of --ngram words of an evaluation record (ngrams.py).
Compared are all its turns but the system's, with the questions of the evaluation rows; --answers adds their answers. What is
left out is counted by evaluation file, the first few are named, and --removed keeps all of them, each with
`contaminated_by` and `overlap`. Without --output nothing is written but the report.

Interrupted work goes on with the same command and ends with the same bytes; FILE.decontaminate.json beside the output has
the settings and counts. SIGINT: status 130; SIGTERM: 75. Memory: that of the evaluation files' runs.
"""

import argparse
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dfactory.commands.arguments import positive
from dfactory.config.words import RECORDS_HELP
from dfactory.data.entries import paths_of
from dfactory.data.examples import documents_of
from dfactory.data.fields import BadRow, Completion, Conversation, Document, Fault, Record
from dfactory.data.jsonlines import json_line
from dfactory.data.progress import reading
from dfactory.data.prompts import parse_prompt, rows_of
from dfactory.data.records import parse_row
from dfactory.data_tools.command import fraction, parser_of, say
from dfactory.data_tools.identity import content_of
from dfactory.data_tools.interrupts import status_of, terminable
from dfactory.data_tools.journal import Journal
from dfactory.data_tools.ngrams import Ngrams, Overlap
from dfactory.data_tools.rows import SHOWN, Place, Refusals, read_all
from dfactory.errors import ConfigError, DataError

STEP = 4096  # rows between two states that are kept
KEPT, REMOVED, REFUSED = "kept", "removed", "refused"


def main(words: list[str] | None = None) -> int:
    options = _parser().parse_args(words)
    for name in ("output", "removed"):
        if (path := getattr(options, name)) is not None and not path.endswith(".jsonl"):
            raise ConfigError(f"--{name} {path}: the name must end in .jsonl, because interrupted work is appended to")
    if options.overlap == 0:
        raise ConfigError("--overlap 0 would leave out every record: give a share above 0")
    if options.removed is not None and options.output is None:
        raise ConfigError("--removed goes with --output: give both, or neither for the report alone")
    grams = read_evaluations(options)
    if options.output is None:
        _look(options, grams)
        return 0
    journal = Journal.of(Path(options.output), "decontaminate", _settings(options))
    removed = Removed(options.removed)
    if journal.is_finished:
        removed.finish()
        say(f"finished before: {_summary(options, journal.counts)}")
        return 0
    try:
        with terminable():
            _write(options, grams, journal, removed)
    except KeyboardInterrupt as interrupt:
        say(f"interrupted; the same command goes on: {_summary(options, journal.counts)}")
        return status_of(interrupt)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("decontaminate")
    parser.add_argument("files", nargs="+", help=RECORDS_HELP)
    parser.add_argument(
        "--against", nargs="+", required=True, metavar="EVAL", help="evaluation files: prompts, or records"
    )
    parser.add_argument("--output", help=".jsonl: the records that stay; without it, only the report")
    parser.add_argument("--removed", metavar="FILE", help=".jsonl: the others, with contaminated_by and overlap")
    parser.add_argument("--ngram", type=positive, default=8, metavar="N", help="words of a run (default: %(default)s)")
    parser.add_argument(
        "--overlap",
        type=fraction,
        default=0.5,
        metavar="SHARE",
        help="of an evaluation record's runs, from which a record is left out (default: %(default)s)",
    )
    parser.add_argument("--answers", action="store_true", help="compare with the answers of the evaluation rows too")
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    parser.add_argument("--skip-bad", action="store_true", help="count rows that cannot be read, and go on")
    return parser


# --- the evaluation files ---------------------------------------------------------------------------------------------


def read_evaluations(options: argparse.Namespace) -> Ngrams:
    """The runs of all evaluation rows. Raises DataError for one that cannot be read, and where there is no text."""
    grams = Ngrams(options.ngram)
    for path in options.against:
        for origin, row in rows_of(path):
            try:
                for text, is_answer in _asked(row):
                    if options.answers or not is_answer:
                        grams.add(origin, text, is_answer)
            except BadRow as bad:
                raise DataError(f"{origin}: {bad}") from bad
    if not grams.origins:
        raise DataError(f"--against {' '.join(options.against)} holds no text to compare with")
    told = [f"{len(grams.origins):,} texts of {', '.join(options.against)}"]
    told += [f"{grams.whole:,} of fewer than {grams.n} words: compared as a whole"] if grams.whole else []
    told += [f"{grams.left_out:,} answers of fewer are not compared"] if grams.left_out else []
    say(", ".join(told))
    return grams


def _asked(row: dict[str, Any] | BadRow) -> Iterator[tuple[str, bool]]:
    """(text, whether it is an answer) of an evaluation row: a record, running text, or a prompt without its answer."""
    if isinstance(row, BadRow):
        raise row
    record = parse_row(row)
    if not isinstance(record, BadRow):
        is_text = "text" in row and isinstance(record, Completion) and not record.prompt
        yield from ((text, is_answer and not is_text) for text, is_answer in _of_record(record))
        return
    yield from _texts(parse_prompt(row))
    if isinstance(row.get("answer"), str):
        yield row["answer"], True


def texts_of(record: Record) -> Iterator[str]:
    """The turns of a record but the system's. Raises BadRow for token ids."""
    return (text for text, _ in _of_record(record))


def _of_record(record: Record) -> Iterator[tuple[str, bool]]:
    for document in documents_of(record):
        yield from _texts(document)


def _texts(document: Document) -> Iterator[tuple[str, bool]]:
    if isinstance(document, Completion):
        yield document.prompt, False
        yield document.completion, True
    elif isinstance(document, Conversation):
        turns = (message for message in document.messages if message["role"] != "system")
        yield from ((message["content"], message["role"] == "assistant") for message in turns)
    else:
        raise BadRow(Fault.FIELD, "token ids cannot be compared with texts: give the records as text")


# --- the records ------------------------------------------------------------------------------------------------------


def _look(options: argparse.Namespace, grams: Ngrams) -> None:
    counts, refusals = Counter[str](), Refusals(options.skip_bad)
    with reading(paths_of(options.files), "comparing") as advance:
        for _, _, _ in _compared(options, grams, counts, refusals, read_all(options.files, advance)):
            pass
    say(f"{_summary(options, counts)}; give --output to leave them out")


def _write(options: argparse.Namespace, grams: Ngrams, journal: Journal, removed: "Removed") -> None:
    place, refusals = journal.state.get("place"), Refusals(options.skip_bad)
    with (
        reading(paths_of(options.files), "comparing") as advance,
        journal,
        removed.cut(journal.state.get("removed", 0)),
    ):
        rows = read_all(options.files, advance, after=Place(*place) if place else None)
        compared = _compared(options, grams, journal.counts, refusals, rows)
        while step := list(itertools.islice(compared, STEP)):
            for _, row, found in step:
                if found is None:
                    journal.write(row)
                else:
                    removed.write(row | {"contaminated_by": found.origin, "overlap": round(found.share, 4)})
            journal.state = {"place": step[-1][0], "removed": removed.sync()}
            journal.save()
        journal.save()
        journal.finish()
    removed.finish()
    say(_summary(options, journal.counts))


class Removed:
    """The file of what is left out, beside the output; the journal's state says how much of it counts."""

    def __init__(self, path: str | None):
        self.path = Path(path) if path else None
        self.partial = self.path and self.path.with_name(f"{self.path.name}.partial")
        self._file: BinaryIO | None = None

    @contextlib.contextmanager
    def cut(self, size: int) -> Iterator[None]:
        """Open it, without what was written after the last state."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.partial.open("ab") as self._file:
            self._file.truncate(size)
            yield

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json_line(row))

    def sync(self) -> int:
        """Bytes that are on the disk now."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def finish(self) -> None:
        """Give it its name, where it has not got it yet."""
        if self.partial is not None and self.partial.is_file():
            self.partial.replace(self.path)


def _compared(
    options: argparse.Namespace, grams: Ngrams, counts: Counter[str], refusals: Refusals, rows: Iterator
) -> Iterator[tuple[Place, dict[str, Any], Overlap | None]]:
    """Each row that can be read, with what it holds of an evaluation record if that is too much."""
    for place, row in rows:
        origin = f"{options.files[place.file_index]}:{place.number}"
        record = row if isinstance(row, BadRow) else parse_row(row, options.pairs)
        try:
            if isinstance(record, BadRow):
                raise record
            found = grams.overlap(texts_of(record))
        except BadRow as bad:
            refusals.add(origin, bad)
            counts[REFUSED] += 1
            continue
        if found is None or found.share < options.overlap:
            counts[KEPT] += 1
            yield place, row, None
            continue
        counts[REMOVED] += 1
        counts[f"by {found.origin.rpartition(':')[0]}"] += 1
        if counts[REMOVED] <= SHOWN:
            say(f"{origin} holds {found.share:.0%} of {found.origin}")
        yield place, row, found


def _summary(options: argparse.Namespace, counts: Counter[str]) -> str:
    """9,000 of 9,010 records stay, 10 hold 50% or more of a record of gsm8k.jsonl (10): clean.jsonl"""
    by = ", ".join(
        f"{name.removeprefix('by ')} ({count:,})" for name, count in counts.items() if name.startswith("by ")
    )
    return (
        f"{counts[KEPT]:,} of {counts[KEPT] + counts[REMOVED]:,} records stay, {counts[REMOVED]:,} hold "
        f"{options.overlap:.0%} or more of an evaluation record"
        + (f" of {by}" if by else "")
        + (f", {counts[REFUSED]:,} refused" if counts[REFUSED] else "")
        + (f": {options.output}" if options.output else "")
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("ngram", "overlap", "answers", "pairs", "skip_bad", "removed")
    return {
        "files_sha256": list(map(content_of, options.files)),
        "against_sha256": list(map(content_of, options.against)),
        **{name: getattr(options, name) for name in names},
    }
