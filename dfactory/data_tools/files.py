"""Writing record files: .jsonl, .jsonl.gz or .parquet by their name, in bounded memory, complete or not there at all."""

import contextlib
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dfactory.data.jsonlines import Changes, json_line, json_text
from dfactory.data_tools.command import say
from dfactory.errors import ConfigError, DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
PARQUET_ROWS = 8192  # of a row group
AS_JSON = "tools"  # a column whose values have no common parquet type; the readers take JSON text there

Write = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Write]:
    """Write rows with the function that this gives. The file gets its name when all of them are in it. Values that a line
    of JSON cannot hold as they are are converted as jsonlines.py says, and reported."""
    path = Path(path)
    if not path.name.endswith(ENDINGS):
        raise ConfigError(f"--output {path}: the name must end in one of {', '.join(ENDINGS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with _parquet(partial) if path.name.endswith(".parquet") else _lines(partial, path) as write:
            yield write
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _lines(partial: Path, path: Path) -> Iterator[Write]:
    opener, changes = gzip.open if path.name.endswith(".gz") else open, Changes()
    with opener(partial, "wb") as file:
        yield lambda row: file.write(json_line(row, changes))
    if summary := str(changes):
        say(f"{path}: {summary}")


@contextlib.contextmanager
def _parquet(partial: Path) -> Iterator[Write]:
    """Columns and their types are those of the first rows; a later row of another type is an error, never cast."""
    import pyarrow
    from pyarrow import parquet

    waiting: list[dict] = []
    writer = None

    def flush() -> None:
        try:
            write_group()
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as problem:
            raise DataError(f"these rows cannot be one parquet file ({problem}): write .jsonl") from problem

    def write_group() -> None:
        nonlocal writer
        names = list(dict.fromkeys(name for row in waiting for name in row))
        if writer and (unknown := set(names).difference(writer.schema.names)):
            raise DataError(f"later rows have the further columns {sorted(unknown)}: write .jsonl")
        columns = {name: [row.get(name) for row in waiting] for name in (writer.schema.names if writer else names)}
        table = pyarrow.Table.from_pydict(columns, schema=writer.schema if writer else None)
        writer = writer or parquet.ParquetWriter(partial, table.schema)
        writer.write_table(table)
        waiting.clear()

    def write(row: dict[str, Any]) -> None:
        waiting.append({name: without_schemas(name, value) for name, value in row.items()})
        if len(waiting) == PARQUET_ROWS:
            flush()

    try:
        yield write
        if waiting:
            flush()
    finally:
        if writer:
            writer.close()


def without_schemas(name: str, value: Any) -> Any:
    """Tools, and the arguments of their calls, as JSON text: in columns of objects, every row would get the keys of all."""
    if name == AS_JSON and value is not None and not isinstance(value, str):
        return json_text(value)
    if not isinstance(value, list):
        return value
    return [_call_as_text(item) if isinstance(item, dict) and item.get("tool_calls") else item for item in value]


def _call_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = [dict(call) for call in message["tool_calls"]]
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and not isinstance(function.get("arguments", ""), str):
            call["function"] = function | {"arguments": json_text(function["arguments"])}
    return message | {"tool_calls": calls}
