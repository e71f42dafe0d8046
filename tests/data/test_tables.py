"""Tables (.json, .parquet, .arrow, .csv) give the records, windows, addresses and verdicts of the same rows as JSONL."""

import csv
import json
import shutil
from pathlib import Path

import datasets
import pytest

from dfactory.config.data import DatasetKeys
from dfactory.data.chat import ChatEncoder
from dfactory.data.examples import DocumentRules, load_examples
from dfactory.data.fields import BadRow, Fault
from dfactory.data.records import read_records
from dfactory.data.streaming import StreamedExamples
from dfactory.errors import CheckpointError, DataError
from tests.data.conftest import EOS, MASK
from tests.data.test_streaming import BLOCK, contents, source_of

KINDS = ("json", "parquet", "arrow", "csv")
PLAIN = [{"prompt": f"the {n}", "completion": "the " * (n % 5) + "end"} for n in range(40)]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
TURNS = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
ANSWER = [{"role": "assistant", "content": "3"}]
CHATS = [
    {
        "messages": [*TURNS, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}],
        "tools": [{"name": "add"}],
    },
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """The library's cache is one of this test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def table(tmp_path):
    """table("parquet", row, ...) writes the rows in that format and gives the path."""

    def write(kind: str, *rows: dict, name: str = "rows") -> str:
        path = tmp_path / "of [mine]*" / f"{name}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "json":
            path.write_text(json.dumps(rows))
        elif kind == "jsonl":
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        elif kind == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif kind == "parquet":
            datasets.Dataset.from_list(list(rows)).to_parquet(path)
        else:
            datasets.Dataset.from_list(list(rows)).save_to_disk(tmp_path / "saved")
            shutil.copy(next((tmp_path / "saved").glob("*.arrow")), path)
        return str(path)

    return write


@pytest.fixture
def readers(tokenizer):
    """readers(entry, ..., option=value) -> Examples read at the start, and streamed."""

    def make(*entries, **changes):
        options = {"on_bad_row": "error", "max_bad_fraction": 0.5, "block_size": BLOCK, "paired": False, **changes}
        rules, encoder = DocumentRules(64, "truncate", EOS, len(tokenizer), MASK), ChatEncoder(tokenizer)
        entries = [entry if isinstance(entry, DatasetKeys) else DatasetKeys(entry) for entry in entries]
        return (
            lambda: load_examples(entries, encoder, **vars(rules), **options),
            lambda: StreamedExamples(entries, encoder, rules, **options),
        )

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_those_of_jsonl(table, kind):
    expected = list(read_records(table("jsonl", *PLAIN)))
    assert list(read_records(table(kind, *PLAIN))) == expected
    assert [number for number, _ in expected] == list(range(1, 41))


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_conversations_with_calls_are_those_of_jsonl(table, kind):
    """Arrow has one type a column: the library keeps values of several types as JSON, and adds nulls elsewhere."""
    assert list(read_records(table(kind, *CHATS))) == list(read_records(table("jsonl", *CHATS)))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_those_of_jsonl_read_at_the_start_streamed_and_resumed(table, readers, kind):
    expected = contents(source_of(readers(table("jsonl", *PLAIN))[0]()), 6)
    path = table(kind, *PLAIN)
    load, stream = readers(path)
    assert contents(source_of(load()), 6) == expected
    first = source_of(stream())
    assert contents(first, 3) == expected[:3]
    cursor = json.loads(json.dumps(first.state_dict()))
    moved = shutil.copyfile(path, Path(path).with_name(f"moved.{kind}"))
    resumed = source_of(readers(str(moved))[1]())
    resumed.load_state_dict(cursor)
    assert contents(resumed, 3) == expected[3:]
    other = source_of(readers(table(kind, *PLAIN[::-1], name="other"))[1]())
    with pytest.raises(CheckpointError, match=r"data .* is now"):
        other.load_state_dict(cursor)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_mix_tables_with_jsonl(table, readers, kind):
    lines, rows = table("jsonl", *PLAIN[:7]), table(kind, *PLAIN[7:20])
    both = [readers(lines, rows)[which]() for which in (0, 1)]
    jsonl = readers(lines, table("jsonl", *PLAIN[7:20], name="second"))[0]()
    sources = [source_of(examples, files=2) for examples in (jsonl, *both)]
    expected, *found = [contents(source, 4) for source in sources]
    assert found == [expected, expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1], ids=["read at the start", "streamed"])
def test_a_bad_row_is_named_or_counted(table, readers, kind, which):
    path = table(kind, *PLAIN[:2], {"prompt": "the", "completion": ""}, *PLAIN[3:6])
    with pytest.raises(DataError, match=rf"rows\.{kind}:3: .*completion"):
        readers(path)[which]()
    examples = readers(path, on_bad_row="skip")[which]()
    assert (examples.report.num_rows, examples.report.num_refused) == (5, 1)
    with pytest.raises(DataError, match=r"max_bad_fraction is 0\.1"):
        readers(path, on_bad_row="skip", max_bad_fraction=0.1)[which]()


def test_a_column_of_another_type_is_a_bad_row_by_name(table):
    (_, good), (number, bad) = read_records(table("json", PLAIN[0], {"prompt": ["x"], "completion": "y"}))
    assert (number, bad.fault, isinstance(good, BadRow)) == (2, Fault.FIELD, False)
    assert "prompt" in str(bad)


@pytest.mark.parametrize("kind, content", [("json", '[{"a": 1},'), ("parquet", "no table"), ("arrow", "no table")])
def test_a_damaged_table_is_named(tmp_path, kind, content):
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)
    for read in (lambda: list(read_records(path)), lambda: StreamedExamples([DatasetKeys(str(path))], None, **RULES)):
        with pytest.raises(DataError, match=rf"rows\.{kind}:0: unreadable after this row \(.*one type a column"):
            read()


RULES = {
    "rules": DocumentRules(64, "truncate", EOS, 100, MASK),
    **{"on_bad_row": "error", "max_bad_fraction": 0.5, "block_size": BLOCK, "paired": False},
}


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_an_empty_table_is_named(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    path.write_text("[]" if kind == "json" else "prompt,completion\n")
    with pytest.raises(DataError, match=rf"rows\.{kind} holds no records"):
        list(read_records(path))
