"""Streamed records give the windows of records read at the start, forget and resume without a trace, and tell bad lines."""

import json

import numpy as np
import pytest

from dfactory.config.data import DatasetKeys
from dfactory.data import streaming
from dfactory.data.chat import ChatEncoder
from dfactory.data.examples import DocumentRules, load_examples
from dfactory.data.source import RecordSource
from dfactory.data.streaming import StreamedExamples
from dfactory.errors import DataError
from tests.data.conftest import EOS, MASK
from tests.data.test_source import one_view

BLOCK = 4


def row(index):
    turns = [("user", f"the {index}"), ("assistant", "the " * (index % 5) + "end")]
    weight = {"weight": 2.5} if index % 7 == 0 else {}
    return {"messages": [{"role": role, "content": text} for role, text in turns]} | weight


def pair(index):
    sides = {side: [{"role": "assistant", "content": f"{side} {index}"}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": "a" * (index % 9 + 1)}], **sides}


@pytest.fixture
def readers(tokenizer):
    """readers(path, ..., option=value) -> the same records, read at the start and streamed."""
    encoder = ChatEncoder(tokenizer)
    rules = DocumentRules(64, "truncate", EOS, len(tokenizer), MASK)

    def make(*paths, paired=False, on_bad_row="error", max_bad_fraction=0.5):
        options = {
            "on_bad_row": on_bad_row,
            "max_bad_fraction": max_bad_fraction,
            "block_size": BLOCK,
            "paired": paired,
        }
        datasets = [DatasetKeys(path) for path in paths]
        return (
            lambda: load_examples(datasets, encoder, **vars(rules), **options),
            lambda: StreamedExamples(datasets, encoder, rules, **options),
        )

    return make


def source_of(examples, files=1, **changes):
    options = {"num_views": 1, "block_size": BLOCK, "eos_id": EOS, "row_length": 256, "seed": 3, "max_epochs": None}
    return RecordSource(examples, [1.5] * files, one_view, **{**options, "accumulation": 2, **changes})


def _lists(columns):
    return {name: column.tolist() for name, column in columns.items()}


def contents(source, count):
    """Documents, tokens, visits and columns of the next windows."""
    windows = [source.next_window() for _ in range(count)]
    return [
        [
            (batch.document_id_D.tolist(), batch.input_ids_RS.tolist(), batch.t_N.tolist(), _lists(batch.columns))
            for batch in window
        ]
        for window in windows
    ]


@pytest.mark.parametrize("make_row, paired", [(row, False), (pair, True)])
@pytest.mark.parametrize("kept", [1, 4096])
def test_streamed_windows_are_those_of_records_read_at_the_start(readers, write, monkeypatch, make_row, paired, kept):
    """Also where nearly everything that was tokenised is forgotten at once, over several epochs of fractional weight."""
    monkeypatch.setattr(streaming, "KEPT", kept)
    paths = [write(*map(make_row, range(23)), name="a.jsonl"), write(*map(make_row, range(9)), name="b.jsonl")]
    read, stream = readers(*paths, paired=paired)
    schedule = {"block_phases": [(0, 2), (3, BLOCK)]}
    assert contents(source_of(stream(), 2, **schedule), 12) == contents(source_of(read(), 2, **schedule), 12)


def test_a_streamed_run_goes_on_where_it_stopped(readers, write):
    _, stream = readers(write(*map(row, range(40))))
    source = source_of(stream())
    contents(source, 3)
    state = json.loads(json.dumps(source.state_dict()))
    expected = contents(source, 6)
    resumed = source_of(stream())
    resumed.load_state_dict(state)
    assert contents(resumed, 6) == expected


def test_blank_and_bad_lines_are_passed_over_and_counted(readers, write):
    rows = [row(0), b"", {"x": 1}, row(3), b"{", row(5)]
    _, stream = readers(write(*rows), on_bad_row="skip", max_bad_fraction=0.5)
    examples = stream()
    seen = {index & 0xFF for window in contents(source_of(examples), 4) for ids, *_ in window for index in ids}
    assert seen == {1, 4, 6}
    assert examples.report.num_refused == 2
    assert examples.report.kept == 3


def test_a_bad_line_ends_the_run_with_its_number(readers, write):
    path = write(*map(row, range(30)), {"x": 1})
    with pytest.raises(DataError, match=r"rows.jsonl:31: no known format"):
        readers(path)[1]()
    with pytest.raises(DataError, match=r"3.23% of the rows .* max_bad_fraction is 0.01"):
        readers(path, on_bad_row="skip", max_bad_fraction=0.01)[1]()


def test_only_jsonl_can_be_streamed(readers, write):
    with pytest.raises(DataError, match="streaming: true reads"):
        readers(write(row(0), name="rows.jsonl.gz"))[1]()


def test_lines_are_found_whatever_ends_them(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 3)
    for body in (b"a\nbb\n\nc", b"a\nbb\n\nc\n", b"\xef\xbb\xbfa\nbb\n\nc\n"):
        file = tmp_path / "x.jsonl"
        file.write_bytes(body)
        lines = streaming.Lines(str(file), lambda count: None)
        assert [lines[index].strip() for index in range(len(lines))] == [b"a", b"bb", b"", b"c"]
        assert np.all(np.diff(lines._end_L1) > 0)
