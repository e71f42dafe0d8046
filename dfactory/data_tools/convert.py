"""Write rows in the readers' own formats, whatever they came in.

    dfactory data convert FILE ... --output NEW.jsonl

In: all that the readers know (Alpaca, Dolly, ShareGPT, OpenAI messages with tools, TRL's prompt and completion and its
preference forms, Orca's, text, token ids). Of GSM8K's question + answer, the text after #### becomes the `answer` that
rewards compare with. Out, by what a row is:

    conversation       messages, and tools       preference pair    prompt, chosen, rejected
    text               prompt + completion, or text                 token ids          as it was

A .json file, as Alpaca and ShareGPT data are published, holds one array of rows and is read whole; its rows are counted from
1. --rename, --tool-calls and --reasoning do what rename_columns, tool_calls and reasoning of a recipe's `datasets` do.
--pair-labels makes pairs of KTO's answers (labelled.py). Further columns are kept, but not by --pair-labels. The first row
that cannot be read ends the command with its file:line, unless --skip-bad.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfactory.config.data import DatasetKeys
from dfactory.config.words import RECORDS_HELP
from dfactory.data.entries import paths_of
from dfactory.data.fields import BadRow, Completion, Conversation, Fault, Pair, Record, show
from dfactory.data.progress import Advance, reading
from dfactory.data.records import parse_json, parse_row, read_columns, read_objects
from dfactory.data.rewriting import rewriter
from dfactory.data_tools.command import parser_of, say
from dfactory.data_tools.files import writing
from dfactory.data_tools.labelled import Labelled
from dfactory.errors import ConfigError, DataError

FINAL_ANSWER = "####"  # stands before the answer proper in GSM8K's answers
SHOWN = 5  # bad rows that are printed


def main(words: list[str] | None = None) -> int:
    parser = parser_of("convert")
    parser.add_argument("files", nargs="+", help=f"{RECORDS_HELP}; .json holds an array of rows")
    parser.add_argument("--output", required=True, help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    parser.add_argument(
        "--pair-labels",
        action="store_true",
        help="make preference pairs of answers that are labelled one by one (KTO: label, kto_tag)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count rows that cannot be read, and go on")
    keys = {field.name: field.metadata for field in dataclasses.fields(DatasetKeys) if field.metadata}
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="THEIRS=OURS",
        help="a column under the name that the readers know, as rename_columns of a recipe; may be repeated",
    )
    for name in ("tool_calls", "reasoning"):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            choices=keys[name]["choices"],
            default=getattr(DatasetKeys(), name),
            help=f"as datasets.{name} of a recipe: {keys[name]['help']} (default: %(default)s)",
        )
    options = parser.parse_args(words)
    rewrite = rewriter(
        DatasetKeys(rename_columns=_names(options.rename), tool_calls=options.tool_calls, reasoning=options.reasoning)
    )

    labelled = Labelled() if options.pair_labels else None

    def convert_row(row: Any) -> list[tuple[str, dict[str, Any]]]:
        if labelled is None:
            return [convert(row, options.pairs)]
        return [("pairs", pair) for pair in labelled.add(row)]

    counts: Counter[str] = Counter()
    with reading(paths_of(options.files), "converting") as advance, writing(options.output) as write:
        for path in options.files:
            for number, row in rows_of(path, advance):
                try:
                    made = convert_row(rewrite(row))
                except BadRow as bad:
                    if not options.skip_bad:
                        raise DataError(f"{path}:{number}: {bad}; or give --skip-bad") from bad
                    counts["refused"] += 1
                    if counts["refused"] <= SHOWN:
                        say(f"refused {path}:{number}: {bad}")
                    continue
                for kind, converted in made:
                    counts[kind] += 1
                    write(converted)
        if not counts.total() - counts["refused"]:
            raise DataError(f"no row of {', '.join(options.files)} could be read")
    if labelled is not None and any(labelled.unpaired):
        good, bad = labelled.unpaired
        say(f"{good:,} good and {bad:,} bad answers have no counterpart and are left out")
    say(f"{', '.join(f'{count:,} {kind}' for kind, count in counts.most_common())}: {options.output}")
    return 0


def _names(words: list[str]) -> dict[str, str]:
    names = dict(word.partition("=")[::2] for word in words)
    if not all(names.values()) or len(set(names.values())) < len(words):
        raise ConfigError(
            f"--rename {' '.join(words)}: give columns as THEIRS=OURS, and every column a name of its own"
        )
    return names


def rows_of(path: str, advance: Advance) -> Iterator[tuple[int, Any]]:
    """The rows of a file with their numbers. Raises DataError for a .json file that is not an array."""
    if not path.endswith(".json"):
        yield from read_objects(path, advance)
        return
    rows = parse_json(Path(path).read_bytes())
    if isinstance(rows, BadRow):
        raise DataError(f"{path}: {rows}; if it has an object a line, name it .jsonl")
    if not isinstance(rows, list):
        raise DataError(f"{path}: {show(rows)} is no array of rows; a file with an object a line is named .jsonl")
    yield from enumerate(rows, start=1)


def convert(row: Any, prefer_pairs: bool = False) -> tuple[str, dict[str, Any]]:
    """(kind, new row). Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(Fault.JSON, f"the row is {show(row)}: it must be a JSON object")
    row = {name: value for name, value in row.items() if value is not None}
    if row.keys() >= {"question", "answer"} and row.keys().isdisjoint(("messages", "prompt", "response")):
        row = _final_answer(row)
    record = parse_row(row, prefer_pairs)
    if isinstance(record, BadRow):
        raise record
    kind, columns = to_columns(record)
    if columns is None:
        return kind, row
    read = read_columns(row, prefer_pairs)
    return kind, columns | {name: value for name, value in row.items() if name not in read}


def to_columns(record: Record) -> tuple[str, dict[str, Any] | None]:
    """(kind, the columns that the readers know it by); None where the row is to stay as it is."""
    if isinstance(record, Pair):
        return _pair(record)
    if isinstance(record, Conversation):
        return "conversations", _conversation(record)
    if isinstance(record, Completion):
        named = {"prompt": record.prompt, "completion": record.completion}
        return "texts", named if record.prompt else {"text": record.completion}
    return "rows of token ids", None


def _pair(pair: Pair) -> tuple[str, dict[str, Any] | None]:
    chosen, rejected = pair
    if isinstance(chosen, Completion):
        columns = {"prompt": chosen.prompt, "chosen": chosen.completion, "rejected": rejected.completion}
    elif isinstance(chosen, Conversation):
        start = chosen.trained_from
        columns = {"prompt": chosen.messages[:start], "chosen": chosen.messages[start:]}
        columns |= {"rejected": rejected.messages[start:]} | ({"tools": chosen.tools} if chosen.tools else {})
    else:
        return "pairs of token ids", None
    return "pairs", columns


def _conversation(record: Conversation) -> dict[str, Any]:
    tools = {"tools": record.tools} if record.tools else {}
    if not record.trained_from:
        return {"messages": record.messages} | tools
    prompt, completion = record.messages[: record.trained_from], record.messages[record.trained_from :]
    return {"prompt": prompt, "completion": completion} | tools


def _final_answer(row: dict) -> dict:
    """GSM8K: training uses the whole answer; rewards compare with the text after ####."""
    if not isinstance(row["answer"], str):
        return row
    final = row["answer"].rpartition(FINAL_ANSWER)[2].strip()
    without = {name: value for name, value in row.items() if name != "answer"}
    return {**without, "response": row["answer"], "answer": final}
