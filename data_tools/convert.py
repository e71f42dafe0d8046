"""Write rows in the readers' own formats, whatever they came in.

    dfactory data convert FILE ... --output NEW.jsonl

In: all that the readers know (Alpaca, ShareGPT, OpenAI messages with tools, TRL's prompt and completion and its preference
forms, text, token ids), and what they do not: question + answer rows as of GSM8K, Alpaca's `system` and `history`, and
ShareGPT's `system` column and speakers function_call and observation. Out, by what a row is:

    conversation       messages, and tools       preference pair    prompt, chosen, rejected
    text               prompt + completion, or text                 token ids          as it was

A .json file, as Alpaca and ShareGPT data are published, holds one array of rows and is read whole; its rows are counted from
1. Further columns are kept. The first row that cannot be read ends the command with its file:line, unless --skip-bad.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.command import parser_of, run, say
from data_tools.files import writing
from dfactory.data.fields import BadRow, Completion, Conversation, Fault, Pair, Record, json_object, show
from dfactory.data.progress import Advance, reading
from dfactory.data.records import parse_json, parse_row, read_objects
from dfactory.errors import DataError

FINAL_ANSWER = "####"  # stands before the answer proper in GSM8K's answers
READ = {  # columns that a record is read from; the others are kept beside it
    *("messages", "conversations", "tools", "prompt", "completion", "chosen", "rejected", "text", "response"),
    *("instruction", "input", "output", "system", "history", "question"),
}
SHOWN = 5  # bad rows that are printed


def main(words: list[str] | None = None) -> int:
    parser = parser_of("convert")
    parser.add_argument("files", nargs="+", help=".jsonl, .jsonl.gz, .parquet, or .json with an array of rows")
    parser.add_argument("--output", required=True, help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    parser.add_argument("--skip-bad", action="store_true", help="count rows that cannot be read, and go on")
    options = parser.parse_args(words)

    counts: Counter[str] = Counter()
    with reading(options.files, "converting") as advance, writing(options.output) as write:
        for path in options.files:
            for number, row in rows_of(path, advance):
                try:
                    kind, converted = convert(row, options.pairs)
                except BadRow as bad:
                    if not options.skip_bad:
                        raise DataError(f"{path}:{number}: {bad}; or give --skip-bad") from bad
                    counts["refused"] += 1
                    if counts["refused"] <= SHOWN:
                        say(f"refused {path}:{number}: {bad}")
                    continue
                counts[kind] += 1
                write(converted)
        if not counts.total() - counts["refused"]:
            raise DataError(f"no row of {', '.join(options.files)} could be read")
    say(f"{', '.join(f'{count:,} {kind}' for kind, count in counts.most_common())}: {options.output}")
    return 0


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
    for columns, adapt in ADAPTERS.items():
        row = adapt(row) if row.keys() >= set(columns) else row
    record = parse_row(row, prefer_pairs)
    if isinstance(record, BadRow):
        raise record
    kind, columns = to_columns(record)
    if columns is None:
        return kind, row
    return kind, columns | {name: value for name, value in row.items() if name not in READ}


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


# --- rows that the readers do not know --------------------------------------------------------------------------------


def _adapt_question(row: dict) -> dict:
    """GSM8K: the whole answer is trained on, what stands behind #### is what a reward compares with."""
    question, answer = row["question"], row["answer"]
    if not isinstance(question, str) or not isinstance(answer, str):
        return row
    final = answer.rpartition(FINAL_ANSWER)[2].strip()
    return {**row, "messages": [*_system(row), _said("user", question), _said("assistant", answer)], "answer": final}


def _adapt_alpaca(row: dict) -> dict:
    """Alpaca with earlier turns, or a system prompt: without this they would be left out."""
    if not (row.get("system") or row.get("history")):
        return row
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow(Fault.FIELD, f"history is {show(history)}: it must be a list of [question, answer]")
    single = parse_row({name: row[name] for name in ("instruction", "input", "output") if name in row})
    if isinstance(single, BadRow):
        raise single
    earlier = [_said(role, text) for turn in history for role, text in zip(("user", "assistant"), turn, strict=True)]
    return {**_without(row, "instruction", "output"), "messages": [*_system(row), *earlier, *single.messages]}


def _adapt_sharegpt(row: dict) -> dict:
    """Calls of tools that are turns of their own speakers, and a system prompt in its own column."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return row
    if not (row.get("system") or any(turn.get("from") in ("function_call", "observation") for turn in turns)):
        return row
    plain = {"human": "user", "gpt": "assistant", "observation": "tool"}
    messages = []
    for turn in turns:
        speaker, value = turn.get("from"), turn.get("value")
        if speaker == "function_call":
            call = json_object(value, "value") if isinstance(value, str) else {}
            messages.append({**_said("assistant", ""), "tool_calls": [{"type": "function", "function": call}]})
        else:
            messages.append(_said(plain.get(speaker, speaker), value))
    return {**_without(row, "conversations"), "messages": [*_system(row), *messages]}


def _system(row: dict) -> list[dict]:
    return [_said("system", row["system"])] if row.get("system") else []


def _said(role: Any, content: Any) -> dict:
    return {"role": role, "content": content}


def _without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


ADAPTERS: dict[tuple[str, ...], Callable[[dict], dict]] = {
    ("question", "answer"): _adapt_question,
    ("instruction", "output"): _adapt_alpaca,
    ("conversations",): _adapt_sharegpt,
}


if __name__ == "__main__":
    sys.exit(run(main, "convert"))
