"""Every format is recognised; every bad row says which field, which value, which rule; damaged files name their line."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfactory.data.records import BadRow, Completion, Conversation, Fault, TokenIds, parse_row, read_records
from dfactory.errors import DataError

ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "yo"}
TURNS = [ASKED, ANSWERED]

FORMATS = {
    "messages": ({"messages": TURNS}, Conversation(TURNS)),
    "tools": (
        {"messages": TURNS, "tools": [{"name": "f"}]},
        Conversation(TURNS, tools=[{"name": "f"}]),
    ),
    "tools as JSON text": ({"messages": TURNS, "tools": '[{"name": "f"}]'}, Conversation(TURNS, tools=[{"name": "f"}])),
    "text parts": (
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]},
        Conversation(TURNS),
    ),
    "null fields": ({"messages": [{**ASKED, "name": None}, ANSWERED], "prompt": None}, Conversation(TURNS)),
    "tool call without text": (
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        Conversation([ASKED, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}]),
    ),
    "instruction": ({"instruction": "hi", "response": "yo"}, Conversation(TURNS)),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        Conversation([{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}]),
    ),
    "alpaca, empty input": ({"instruction": "hi", "input": "", "output": "yo"}, Conversation(TURNS)),
    "alpaca, no input": ({"instruction": "hi", "output": "yo"}, Conversation(TURNS)),
    "completion": ({"prompt": "hi", "completion": "yo"}, Completion("hi", "yo")),
    "completion without prompt text": ({"prompt": "", "completion": "yo"}, Completion("", "yo")),
    "conversational completion": (
        {"prompt": [*TURNS, ASKED], "completion": [ANSWERED]},
        Conversation([*TURNS, ASKED, ANSWERED], trained_from=3),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "yo"},
            ]
        },
        Conversation([{"role": "system", "content": "s"}, *TURNS]),
    ),
    "token ids": ({"input_ids": [5, 6, 7], "prompt_lengths": 2}, TokenIds([5, 6, 7], 2)),
    "text": ({"text": "hi\nyo "}, Completion("", "hi\nyo ")),
    "text beside another format": ({"text": "hi yo", "messages": TURNS}, Conversation(TURNS)),
    "further columns": ({"id": 7, "score": 0.5, "prompt": "hi", "completion": "yo"}, Completion("hi", "yo")),
}

TRACE = {"prompt_ids": [5, 6], "token_ids": [7, 8, 9, 10, 11, 12], "commit_step": [0, 1, 2, 2, 3, 4], "block_size": 4}

BAD = {
    "list": ([1], Fault.JSON, "the row is list [1]"),
    "unknown": ({"story": "hi", "prompt": "a"}, Fault.FORMAT, "['prompt', 'story']"),
    "messages text": ({"messages": "hi"}, Fault.FIELD, "messages is str 'hi': it must be a list"),
    "no messages": ({"messages": []}, Fault.FIELD, "messages is empty"),
    "message text": ({"messages": ["hi"]}, Fault.FIELD, "messages[0] is str 'hi'"),
    "role": ({"messages": [{"role": "bot", "content": "a"}]}, Fault.FIELD, "messages[0].role is str 'bot'"),
    "role list": ({"messages": [{"role": [], "content": "a"}]}, Fault.FIELD, "messages[0].role is list []"),
    "no role": ({"messages": [{"content": "a"}]}, Fault.FIELD, "messages[0].role is missing"),
    "no content": ({"messages": [{"role": "user"}]}, Fault.FIELD, "messages[0].content is missing"),
    "content": ({"messages": [ASKED, {"role": "assistant", "content": 3}]}, Fault.FIELD, "messages[1].content is int 3"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, Fault.FIELD, "messages[0].content[0]"),
    "no answer": ({"messages": [ASKED]}, Fault.NO_ANSWER, "messages has no assistant turn"),
    "empty turn": ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, Fault.EMPTY, "messages[1].content"),
    "tool_calls": ({"messages": [{**ANSWERED, "tool_calls": "f()"}]}, Fault.FIELD, "messages[0].tool_calls is str"),
    "tools": ({"messages": TURNS, "tools": 3}, Fault.FIELD, "tools is int 3"),
    "tools text": ({"messages": TURNS, "tools": "f()"}, Fault.FIELD, "tools is text but not valid JSON"),
    "response": ({"instruction": "hi", "response": 3}, Fault.FIELD, "response is int 3: it must be text"),
    "empty output": ({"instruction": "hi", "output": ""}, Fault.EMPTY, "output is empty"),
    "empty completion": ({"prompt": "hi", "completion": "\n"}, Fault.EMPTY, "completion is empty"),
    "empty text": ({"text": ""}, Fault.EMPTY, "text is empty"),
    "blank text": ({"text": " \n\t"}, Fault.EMPTY, "text is empty"),
    "text of lines": ({"text": ["a", "b"]}, Fault.FIELD, "text is list ['a', 'b']: it must be text"),
    "mixed": ({"prompt": "hi", "completion": [ANSWERED]}, Fault.FIELD, "completion is list"),
    "context only": ({"prompt": TURNS, "completion": [ASKED]}, Fault.NO_ANSWER, "completion has no assistant turn"),
    "from": ({"conversations": [{"from": "bing", "value": "a"}]}, Fault.FIELD, "conversations[0].from is str 'bing'"),
    "value": ({"conversations": [{"from": "gpt"}]}, Fault.FIELD, "conversations[0].value is missing"),
    "surrogate": ({"prompt": "\ud800", "completion": "a"}, Fault.ENCODING, "prompt holds a lone surrogate"),
    "deep surrogate": (
        {"messages": [{**ANSWERED, "tool_calls": [{"arguments": {"x": "\udfff"}}]}]},
        Fault.ENCODING,
        "messages[0].tool_calls[0].arguments.x holds a lone surrogate",
    ),
    "ids": ({"input_ids": "5 6", "prompt_lengths": 1}, Fault.FIELD, "input_ids is str '5 6'"),
    "float id": ({"input_ids": [5, 6.0], "prompt_lengths": 1}, Fault.FIELD, "input_ids[1] is float 6.0"),
    "bool id": ({"input_ids": [True], "prompt_lengths": 0}, Fault.FIELD, "input_ids[0] is bool True"),
    "negative id": ({"input_ids": [-1], "prompt_lengths": 0}, Fault.FIELD, "input_ids[0] is int -1"),
    "huge id": ({"input_ids": [2**70], "prompt_lengths": 0}, Fault.FIELD, "input_ids[0] is int 118"),
    "prompt_lengths": ({"input_ids": [5], "prompt_lengths": 2}, Fault.FIELD, "prompt_lengths is int 2: it must be"),
    "trace: block_size": ({**TRACE, "block_size": None}, Fault.FIELD, "block_size is missing"),
    "trace: part of a block": ({**TRACE, "block_size": 5}, Fault.FIELD, "token_ids have 2 + 6 tokens: a trace runs"),
    "trace: steps": ({**TRACE, "commit_step": [0, 1]}, Fault.FIELD, "commit_step has 2 numbers for 6 token_ids"),
    "trace: a mask was left": ({**TRACE, "commit_step": [0, 1, -1, 2, 3, 4]}, Fault.TRACE, "commit_step[2] is -1: a mask"),
    "trace: below a mask": ({**TRACE, "commit_step": [0, 1, -2, 2, 3, 4]}, Fault.FIELD, "commit_step[2] is int -2"),
    "trace: order": ({**TRACE, "commit_step": [0, 2, 2, 2, 3, 4]}, Fault.FIELD, "commit_step goes back from one block"),
    "trace: tokens": ({**TRACE, "token_ids": "x"}, Fault.FIELD, "token_ids is str 'x'"),
    "trace: edits": ({**TRACE, "edits": 2}, Fault.FIELD, "edits is int 2"),
    "trace: correct": ({**TRACE, "correct": "no"}, Fault.FIELD, "correct is str 'no'"),
    "prompt_lengths list": ({"input_ids": [5], "prompt_lengths": [1]}, Fault.FIELD, "prompt_lengths is list [1]"),
}  # fmt: skip


@pytest.mark.parametrize("row, expected", FORMATS.values(), ids=FORMATS)
def test_recognises_the_format(row, expected):
    record = parse_row(row)
    assert record == expected
    assert type(record) is type(expected)


@pytest.mark.parametrize("row, fault, message", BAD.values(), ids=BAD)
def test_a_bad_row_names_its_field(row, fault, message):
    bad = parse_row(row)
    assert isinstance(bad, BadRow)
    assert bad.fault is fault
    assert message in str(bad)


@pytest.mark.parametrize(
    "row, steps, edited, correct",
    [
        ({}, [-1, -1, 0, 1, 0, 0, 1, 2], False, None),
        ({"messages": TURNS, "correct": True, "edits": []}, [-1, -1, 0, 1, 0, 0, 1, 2], False, True),
        ({"correct": False, "edits": [{}]}, [-1, -1, 0, 1, 0, 0, 1, 2], True, False),
        ({"commit_step": [1, 0, 5, 9, 7, 9]}, [-1, -1, 1, 0, 0, 2, 1, 2], False, None),  # idle forwards leave no gap
        (
            {"prompt_ids": [1] * 4, "token_ids": [5, 6, 7, 8], "commit_step": [3, 2, 1, 0]},
            [-1] * 4 + [3, 2, 1, 0],
            False,
            None,
        ),
    ],
)
def test_a_trace_counts_the_steps_of_each_block(row, steps, edited, correct):
    record = parse_row({**TRACE, **row})
    assert isinstance(record, TokenIds)
    assert record.input_ids == row.get("prompt_ids", [5, 6]) + row.get("token_ids", TRACE["token_ids"])
    assert record.prompt_length == len(row.get("prompt_ids", [5, 6]))
    assert record.trace.commit_step_T.tolist() == steps
    assert record.trace.commit_step_T.dtype == np.int16
    assert record.trace[1:] == (4, edited, correct, False, 0)  # neither a canvas nor masks left


GOOD_LINE = b'{"prompt": "hi", "completion": "yo"}'
GOOD = Completion("hi", "yo")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines_keep_their_numbers(write, name):
    path = write(b"\xef\xbb\xbf" + GOOD_LINE + b"\r", b"", b"  \r", GOOD_LINE, name=name)
    assert list(read_records(path)) == [(1, GOOD), (4, GOOD)]


def test_the_last_line_may_lack_its_newline(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD_LINE + b"\n" + GOOD_LINE)
    assert list(read_records(path)) == [(1, GOOD), (2, GOOD)]


def test_unicode_separators_do_not_end_a_line(write):
    path = write({"prompt": "a\u2028b\x85c", "completion": "yo"})
    assert list(read_records(path)) == [(1, Completion("a\u2028b\x85c", "yo"))]
    raw = '{"prompt": "a\u2028b", "completion": "yo"}'.encode()
    assert list(read_records(write(raw))) == [(1, Completion("a\u2028b", "yo"))]


@pytest.mark.parametrize(
    "line, fault, message",
    [
        (b'{"prompt": "hi", ', Fault.JSON, "not valid JSON"),
        (b'{"prompt": "hi", "completion": "yo", "score": NaN}', Fault.JSON, "NaN is not a JSON value"),
        (b"\xff\xfe", Fault.ENCODING, "byte 0 of the line is not UTF-8"),
        (b'{"prompt": "\xe9", "completion": "yo"}', Fault.ENCODING, "byte 12 of the line is not UTF-8"),
        (b"[" * 100_000, Fault.JSON, "not valid JSON"),
        (b'{"input_ids": [' + b"9" * 5000 + b'], "prompt_lengths": 0}', Fault.JSON, "not valid JSON"),
        (b"null", Fault.JSON, "the row is missing"),
    ],
)
def test_a_bad_line_is_a_bad_row(write, line, fault, message):
    (one, first), (two, bad), (three, last) = read_records(write(GOOD_LINE, line, GOOD_LINE))
    assert (one, two, three) == (1, 2, 3)
    assert first == last == GOOD
    assert bad.fault is fault
    assert message in str(bad)


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"messages": TURNS, "score": 1.0}, {"messages": None, "score": float("nan")}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    (one, first), (two, bad) = read_records(path)
    assert (one, first) == (1, Conversation(TURNS))
    assert (two, bad.fault) == (2, Fault.FORMAT)


def test_parquet_with_a_string_that_is_no_text(tmp_path):
    path = tmp_path / "rows.parquet"
    column = pa.array([b"hi", b"\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, column.buffers())
    pq.write_table(pa.table({"prompt": text, "completion": pa.array(["yo", "yo"])}), path)
    (_, first), (_, bad) = read_records(path)
    assert first == GOOD
    assert bad.fault is Fault.ENCODING


def test_a_truncated_gz_names_the_line_reached(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    lines = [json.dumps({"prompt": f"{i * 7919:x}", "completion": "yo"}) for i in range(20_000)]
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:-2000])
    records = read_records(path)
    numbers = []
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:\d+: unreadable") as caught:
        numbers.extend(number for number, _ in records)
    assert len(numbers) > 10_000
    assert f":{numbers[-1]}:" in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet"])
def test_a_file_of_another_kind(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD_LINE)
    with pytest.raises(DataError, match=rf"{name}:0: unreadable"):
        list(read_records(tmp_path / name))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl is not a file"):
        list(read_records(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="is not a file"):
        list(read_records(tmp_path))


def test_an_empty_file_is_named(write):
    with pytest.raises(DataError, match=r"rows\.jsonl holds no records"):
        list(read_records(write(b"", b"  ")))


def test_an_unknown_ending(tmp_path):
    (tmp_path / "rows.txt").write_text("a,b")
    with pytest.raises(DataError, match=r"rows\.txt.* must end in .jsonl, .jsonl.gz, .json, .parquet, .arrow or .csv"):
        list(read_records(tmp_path / "rows.txt"))
