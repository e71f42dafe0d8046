"""Files of any kind as parquet shards of one schema, in a folder that the hub and the `datasets` library read as it is.

    dfactory data export-parquet FILE ... --output FOLDER [--split train] [--rows-per-shard 100000]

A first pass over all rows finds the schema: a column that lacks values somewhere stays, integers among fractions become
fractions, and `tools` and the arguments of calls become JSON text, because their keys differ from row to row. A column of
values that no type holds is refused with both types and the first row that differs. The second pass writes
FOLDER/data/SPLIT-00000-of-00003.parquet, ..., and README.md with the names of the splits, unless there is one.

Interrupted work goes on with the same command, after the last whole shard (SIGINT: status 130, SIGTERM: 75).
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfactory.commands.arguments import positive
from dfactory.config.words import RECORDS_HELP
from dfactory.data.entries import paths_of
from dfactory.data.fields import BadRow
from dfactory.data.progress import reading
from dfactory.data_tools.command import parser_of, say
from dfactory.data_tools.files import PARQUET_ROWS, without_schemas
from dfactory.data_tools.identity import content_of
from dfactory.data_tools.interrupts import status_of, terminable
from dfactory.data_tools.rows import Place, Refusals, read_all
from dfactory.errors import ConfigError, DataError

STATE = ".export-parquet.json"
CARD = "README.md"


def main(words: list[str] | None = None) -> int:
    parser = parser_of("export-parquet")
    parser.add_argument("files", nargs="+", help=RECORDS_HELP)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="new, or of an interrupted command"
    )
    parser.add_argument("--split", default="train", help="name of the shards (default: %(default)s)")
    parser.add_argument("--rows-per-shard", type=positive, default=100_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--compression", default="zstd", choices=("zstd", "snappy", "none"), help="(default: %(default)s)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="count lines that are no JSON object, and go on")
    options = parser.parse_args(words)
    if not options.split.replace("-", "_").isidentifier():
        raise ConfigError(f"--split {options.split}: give a word of letters, digits, - and _")
    state = State.of(options)
    try:
        with terminable():
            state.schema = state.schema or _find_schema(options)
            state.save()
            _write(options, state)
    except KeyboardInterrupt as interrupt:
        say(f"interrupted after {len(state.shards):,} whole shards; the same command goes on")
        return status_of(interrupt)
    return 0


class State:
    """What is done: the schema, and the whole shards as (rows, place of the last one)."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.file, self.settings = folder, folder / STATE, settings
        self.schema: Any = None
        self.shards: list[tuple[int, Place]] = []

    @classmethod
    def of(cls, options: argparse.Namespace) -> "State":
        """New, or an interrupted command's. Raises ConfigError where the folder holds something else."""
        import pyarrow

        names = ("split", "rows_per_shard", "compression", "skip_bad")
        settings = {"files": list(map(content_of, options.files)), **{name: getattr(options, name) for name in names}}
        state = cls(options.output, settings)
        there = sorted(options.output.glob(f"data/{options.split}-*.parquet"))
        if not state.file.is_file():
            if there:
                raise ConfigError(
                    f"--output {options.output} holds {there[0].name}: remove it, or give another --split"
                )
            return state
        try:
            stored = json.loads(state.file.read_text(encoding="utf-8"))
            known, shards, schema = stored["settings"], stored["shards"], stored["schema"]
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(f"{state.file} is damaged ({problem}): remove it and data/") from problem
        for name, value in settings.items():
            if known.get(name) != value:
                raise ConfigError(
                    f"{options.output} was started with {name} {known.get(name)}, and is now asked for with {value}: give "
                    f"the same, name another --output, or remove {state.file} and data/"
                )
        state.shards = [(rows, Place(*place)) for rows, place in shards]
        state.schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(bytes.fromhex(schema)))
        return state

    def path(self, index: int, total: int | None = None) -> Path:
        """Of a shard; as long as their number is not known, under a name that nobody reads."""
        of = "" if total is None else f"-of-{total:05}"
        name = f"{self.settings['split']}-{index:05}{of}.parquet"
        return self.folder / "data" / (name if of else f".{name}")

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        schema = self.schema.serialize().to_pybytes().hex()
        stored = {"settings": self.settings, "shards": self.shards, "schema": schema}
        partial = self.file.with_name(f"{STATE}.partial")
        partial.write_text(json.dumps(stored), encoding="utf-8")
        partial.replace(self.file)


# --- the two passes ---------------------------------------------------------------------------------------------------


def _rows(
    options: argparse.Namespace, label: str, after: Place | None = None
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """(place, row in the types of the output) of every row that is one."""
    refusals = Refusals(options.skip_bad)
    with reading(paths_of(options.files), label) as advance:
        for place, row in read_all(options.files, advance, after):
            if isinstance(row, BadRow):
                refusals.add(f"{options.files[place.file_index]}:{place.number}", row)
                continue
            yield place, {name: without_schemas(name, value) for name, value in row.items()}
    if refusals.count and label == "writing":
        say(f"{refusals.count:,} lines refused: they are not in the shards")


def _find_schema(options: argparse.Namespace) -> Any:
    import pyarrow

    schema = None
    rows = _rows(options, "reading types")
    while batch := list(itertools.islice(rows, PARQUET_ROWS)):
        for name in dict.fromkeys(name for _, row in batch for name in row):
            schema = _with_column(options, schema, name, batch)
    if schema is None:
        raise DataError(f"{' '.join(options.files)}: no row can be read")
    fields = [pyarrow.field(f.name, pyarrow.string()) if pyarrow.types.is_null(f.type) else f for f in schema]
    return pyarrow.schema(fields)


def _with_column(options: argparse.Namespace, schema: Any, name: str, batch: list[tuple[Place, dict]]) -> Any:
    import pyarrow

    first, last = (f"{options.files[place.file_index]}:{place.number}" for place in (batch[0][0], batch[-1][0]))
    try:
        found = pyarrow.schema([pyarrow.field(name, pyarrow.array([row.get(name) for _, row in batch]).type)])
        return found if schema is None else pyarrow.unify_schemas([schema, found], promote_options="permissive")
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as problem:
        raise DataError(
            f"column {name}, from {first} to {last}, holds values of several types ({str(problem).splitlines()[0]}): give "
            "it one type, or leave it out"
        ) from problem


def _write(options: argparse.Namespace, state: State) -> None:
    import pyarrow
    from pyarrow import parquet

    (state.folder / "data").mkdir(parents=True, exist_ok=True)
    rows = _rows(options, "writing", after=state.shards[-1][1] if state.shards else None)
    compression = None if options.compression == "none" else options.compression
    while batch := next(_batches(rows, options.rows_per_shard), None):
        path, count = state.path(len(state.shards)), 0
        with parquet.ParquetWriter(path, state.schema, compression=compression) as writer:
            while batch:
                names = state.schema.names
                columns = {name: [row.get(name) for _, row in batch] for name in names}
                writer.write_table(pyarrow.Table.from_pydict(columns, schema=state.schema))
                count, place = count + len(batch), batch[-1][0]
                batch = next(_batches(rows, options.rows_per_shard - count), None)
        state.shards.append((count, place))
        state.save()
    _finish(state)
    total, shards = sum(count for count, _ in state.shards), len(state.shards)
    say(f"{total:,} rows in {shards:,} shard{'s' * (shards != 1)}, {len(state.schema)} columns: {state.folder}")


def _batches(rows: Iterator, most: int) -> Iterator[list]:
    while batch := list(itertools.islice(rows, min(most, PARQUET_ROWS))):
        yield batch


def _finish(state: State) -> None:
    """Names with the number of shards, and a card where there is none."""
    total, split = len(state.shards), state.settings["split"]
    for index in range(total):
        if state.path(index).is_file():
            state.path(index).replace(state.path(index, total))
    card = state.folder / CARD
    if not card.exists():
        files = f"configs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: data/{split}-*\n"
        card.write_text(f"---\n{files}---\n", encoding="utf-8")
    state.file.unlink()
