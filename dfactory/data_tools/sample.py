"""Some rows of files, as they stand, in their order.

    dfactory data sample FILE ... --output SOME.jsonl --count 1000 [--by source]
    dfactory data sample FILE ... --output SOME.jsonl --fraction 0.1

Which rows is a function of the seed and of each row's place: the rows of a smaller --count or --fraction are among those of
a larger one. --by draws from every value of a column apart. --count reads the files twice and keeps the places of the rows
that are drawn; --fraction reads them once.
"""

import argparse
import hashlib
import heapq
from collections import Counter
from collections.abc import Callable
from typing import Any

from dfactory.commands.arguments import positive
from dfactory.config.words import RECORDS_HELP
from dfactory.data.entries import paths_of
from dfactory.data.fields import BadRow
from dfactory.data.progress import reading
from dfactory.data_tools.command import fraction, parser_of, say
from dfactory.data_tools.files import writing
from dfactory.data_tools.rows import Place, Refusals, read_all
from dfactory.errors import ConfigError, DataError

MOST_VALUES = 10_000  # of the column of --by
SHOWN_VALUES = 20

Chooses = Callable[[Place, str], bool]


def main(words: list[str] | None = None) -> int:
    parser = parser_of("sample")
    parser.add_argument("files", nargs="+", help=RECORDS_HELP)
    parser.add_argument("--output", required=True, help=".jsonl, .jsonl.gz or .parquet")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--count", type=positive, metavar="N", help="rows; with --by, of each value")
    size.add_argument("--fraction", type=fraction, metavar="F", help="share of the rows; met only about")
    parser.add_argument("--by", metavar="COLUMN", help="draw from each value of this column apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-bad", action="store_true", help="count lines that are no JSON object, and go on")
    options = parser.parse_args(words)

    chosen = _by_fraction(options) if options.count is None else _by_count(options)
    found, drawn, refusals = Counter[str](), Counter[str](), Refusals(options.skip_bad)
    with reading(paths_of(options.files), "writing") as advance, writing(options.output) as write:
        for place, row in read_all(options.files, advance):
            if isinstance(row, BadRow):
                refusals.add(f"{options.files[place.file_index]}:{place.number}", row)
                continue
            value = value_of(row, options.by)
            found[value] += 1
            if chosen(place, value):
                drawn[value] += 1
                write(row)
        if not drawn:
            raise DataError(f"none of {found.total():,} rows was drawn{refusals}: give a larger --fraction")
    say(f"{drawn.total():,} of {found.total():,} rows{refusals}: {options.output}")
    for value, count in found.most_common(SHOWN_VALUES) if options.by else ():
        say(f"  {drawn[value]:,} of {count:,} with {options.by} {value}")
    return 0


def value_of(row: dict[str, Any], column: str | None) -> str:
    """Of a column, as text; empty without one."""
    return "" if column is None else str(row.get(column))


def draw(place: Place, seed: int) -> int:
    """64 bits, uniform over places."""
    digest = hashlib.blake2b(f"{seed}/{place.file_index}/{place.number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _by_fraction(options: argparse.Namespace) -> Chooses:
    below = int(options.fraction * 2**64)
    return lambda place, value: draw(place, options.seed) < below


def _by_count(options: argparse.Namespace) -> Chooses:
    """A first pass finds, for each value, the places with the smallest numbers."""
    smallest: dict[str, list[tuple[int, Place]]] = {}
    with reading(paths_of(options.files), "drawing") as advance:
        for place, row in read_all(options.files, advance):
            if isinstance(row, BadRow):
                continue
            heap = smallest.setdefault(value_of(row, options.by), [])
            item = (-draw(place, options.seed), place)
            if len(heap) < options.count:
                heapq.heappush(heap, item)
            elif item > heap[0]:
                heapq.heapreplace(heap, item)
            if len(smallest) > MOST_VALUES:
                raise ConfigError(f"--by {options.by} has more than {MOST_VALUES:,} values: name a column with fewer")
    places = {place for heap in smallest.values() for _, place in heap}
    return lambda place, value: place in places
