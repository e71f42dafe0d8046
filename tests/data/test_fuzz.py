"""Hostile files never crash a reader, and never make the mask; what the long run found stays here, row by row."""

import gzip
import json

import pytest
from transformers import AddedToken

from dfactory.data import records
from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import BadRow, Fault, load_json
from dfactory.data.prompts import encode_prompt, read_rows
from dfactory.data.records import parse_line, read_records
from dfactory.errors import DataError
from tests.data.conftest import make_tokenizer
from tests.data.fuzz import DEPTHS, Reader, fuzz, read_huge

ANSWER = {"role": "assistant", "content": "yo"}


def test_five_thousand_hostile_lines(tmp_path):
    reader = Reader(tmp_path)
    fuzz(reader, 5000)
    assert reader.lines > 4000
    assert reader.kept > 100
    assert reader.broken > 30
    assert sum(count > 0 for count in reader.refused.values()) >= 6


@pytest.mark.parametrize("depth", DEPTHS)
def test_deep_values_are_refused_at_one_depth_wherever_they_stand(depth, tokenizer):
    """Levels are those of the value; inside a row, the row and its lists count too."""
    nested = "[" * depth + "]" * depth
    if depth <= 100:
        load_json(nested)
    else:
        with pytest.raises(ValueError, match="nested deeper than 100 levels"):
            load_json(nested)
    turn = f'{{"role": "user", "content": "hi", "extra": {nested}}}'
    row = parse_line(f'{{"messages": [{turn}, {json.dumps(ANSWER)}]}}'.encode())
    assert isinstance(row, BadRow) == (depth + 3 > 100)
    if not isinstance(row, BadRow):
        ChatEncoder(tokenizer).encode_messages(row["messages"])


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 10_000, "nested deeper"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt_ids": [-1]}', "from 0 to"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": 7}', "tools is int 7"),
    ],
)
def test_hostile_prompts_name_file_and_line(line, said, tmp_path, tokenizer):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + line)
    with pytest.raises(DataError, match=rf"prompts.jsonl:2.*{said}"):
        [encode_prompt(row, ChatEncoder(tokenizer)) for row in read_rows(file)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_that_no_memory_holds_is_a_bad_row(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    rows = b'{"text": "hi"}\n{"text": "' + b"a" * 5000 + b'"}\n{"text": "yo"}'
    file = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    file.write_bytes(gzip.compress(rows) if packed else rows)
    (_, first), (number, huge), (last, second) = read_records(file)
    assert (number, last) == (2, 3)
    assert not isinstance(first, BadRow)
    assert not isinstance(second, BadRow)
    assert huge.fault == Fault.LINE
    assert "more than 1000 bytes: split the record" in str(huge)


@pytest.mark.slow
def test_lines_of_fifty_megabytes(tmp_path, capsys):
    reader = Reader(tmp_path)
    read_huge(reader)
    assert reader.refused[Fault.LINE] == 4 * 9  # single and paired, plain and gzipped
    assert capsys.readouterr().out.count("\n") == 9


def test_all_private_use_characters_and_a_literal(tokenizer):
    """None is left to stand for the literal while the template runs."""
    text = "<|mask|>" + "".join(map(chr, range(0xF0000, 0xFFFFE)))
    with pytest.raises(BadRow, match="private-use") as caught:
        ChatEncoder(tokenizer).encode_messages([{"role": "user", "content": text}, ANSWER])
    assert caught.value.fault == Fault.SPECIAL_TOKEN


def test_a_long_run_of_spaces_before_a_token_that_swallows_them():
    """RoBERTa's <mask> is such a token; the search must not look at the run again from each of its spaces."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": AddedToken("<|mask|>", lstrip=True, rstrip=True)})
    pattern = ChatEncoder(tokenizer)._special_pattern
    found = pattern.findall("a  <|mask|> <|mask|>\n<|mask|> b" + " " * 100_000)  # some hours, if it did
    assert found == ["  <|mask|> ", "<|mask|>\n", "<|mask|> "]
