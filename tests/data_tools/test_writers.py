"""Every writer takes what parquet and JSON rows can hold, and what it writes our own reader reads."""

import datetime
import decimal
import json
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfactory.commands.generate import write_outputs
from dfactory.data.fields import Completion
from dfactory.data.records import read_objects, read_records
from dfactory.errors import DataError

DAY = datetime.date(2024, 2, 29)
VALUES = {  # what a parquet column can hold -> what stands in JSON
    "date": (DAY, "2024-02-29"),
    "moment": (datetime.datetime(2024, 2, 29, 1, 2, 3), "2024-02-29T01:02:03"),
    "time": (datetime.time(1, 2, 3), "01:02:03"),
    "span": (datetime.timedelta(seconds=90), 90.0),
    "price": (decimal.Decimal("1.50"), 1.5),
    "exact": (decimal.Decimal("0.1000000000000000055511151231257827"), "0.1000000000000000055511151231257827"),
    "picture": (b"\xff\x00", "/wA="),
    "hole": (float("nan"), None),
    "high": (float("inf"), None),
    "nested": ({"when": DAY, "scores": [1.0, float("nan")]}, {"when": "2024-02-29", "scores": [1.0, None]}),
}
RECORD = {"prompt": "hi", "completion": "yo"}


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist([RECORD | {name: value for name, (value, _) in VALUES.items()}]), path)
    return str(path)


@pytest.mark.parametrize("verb", ["convert", "dedup", "split"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_values_of_parquet_become_json(verb, ending, parquet, tool, rows_of, tmp_path):
    out = tmp_path / f"all{ending}"
    words = ["all=1", "none=0", "--format", ending, "--output", tmp_path] if verb == "split" else ["--output", out]
    status, shown = tool(verb, parquet, *words)
    assert status == 0
    (row,) = rows_of(out)
    assert row == RECORD | {name: value for name, (_, value) in VALUES.items()}
    assert [record for _, record in read_records(out)] == [Completion("hi", "yo")]
    told = " ".join(shown.split())
    assert "NaN or infinite: 1 of hole, 1 of high, 1 of nested; written as null" in told
    assert "bytes: 1 of picture; written as base64" in told


@pytest.mark.parametrize("verb", ["convert", "dedup"])
def test_values_of_parquet_stay_in_parquet(verb, parquet, tool, tmp_path):
    out = tmp_path / "out.parquet"
    assert tool(verb, parquet, "--output", out)[0] == 0
    before, after = (dict(next(read_objects(path))[1]) for path in (parquet, out))
    for row in (before, after):
        assert repr(row.pop("nested")) == "{'when': datetime.date(2024, 2, 29), 'scores': [1.0, nan]}"
        assert repr(row.pop("hole")) == "nan"
    assert before == after


def test_rows_that_parquet_cannot_hold_are_a_message(tool, files, tmp_path):
    rows = {
        "a whole number of 70 bits": [{**RECORD, "n": 2**70}],
        "an object without keys": [{**RECORD, "n": {}}],
        "values of two types": [{**RECORD, "n": 1}, {**RECORD, "n": "x"}],
    }
    for name, lines in rows.items():
        path = files(f"{len(name)}.jsonl", *lines)
        with pytest.raises(DataError, match=r"cannot be one parquet file .*write .jsonl"):
            tool("convert", path, "--output", tmp_path / "out.parquet")
    path = files("mixed.jsonl", [1, 2])
    with pytest.raises(DataError, match=r"mixed.jsonl:1: .* must be a JSON object"):
        tool("mix", path, "--output", tmp_path / "out.parquet")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_half_a_character_in_a_column_that_nobody_reads(ending, tool, tmp_path, rows_of):
    """JSON can spell it, so a file of lines keeps it; parquet cannot."""
    source, out = tmp_path / "in.jsonl", tmp_path / f"out{ending}"
    source.write_text('{"prompt": "hi", "completion": "yo", "note": "\\ud800"}\n')
    if ending == ".parquet":
        with pytest.raises(DataError, match="cannot be one parquet file"):
            tool("convert", source, "--output", out)
        return
    assert tool("convert", source, "--output", out)[0] == 0
    assert rows_of(out)[0]["note"] == "\ud800"


def test_outputs_of_generate_are_json_too(tmp_path):
    write_outputs(tmp_path / "out.jsonl", [{"day": DAY, "score": float("nan"), "text": "\udfff"}])
    text = (tmp_path / "out.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"day": "2024-02-29", "score": None, "text": "\udfff"}


def test_a_value_that_json_has_no_form_for_is_named(tmp_path):
    with pytest.raises(DataError, match=r"column key holds a UUID, which has no form in JSON: .* remove the column"):
        write_outputs(tmp_path / "out.jsonl", [{"key": uuid.UUID(int=1)}])
