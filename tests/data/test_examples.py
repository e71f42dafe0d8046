"""From files to documents: EOS, truncation, what is refused and how it is reported."""

import numpy as np
import pytest

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import BadRow
from dfactory.data.records import Fault, parse_row
from dfactory.errors import ConfigError, DataError
from tests.data.conftest import EOS, MASK

GOOD = {"prompt": "hi", "completion": "yo"}


def ids(count, prompt, last=40):
    return {"input_ids": [*range(30, 30 + count - 1), last], "prompt_lengths": prompt}


def test_a_text_ends_with_eos(load, write, show):
    conversation = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    trailing = {"messages": [*conversation["messages"], {"role": "user", "content": "r"}]}
    shown = [show(e.input_ids_T, e.trainable_T) for e in load(write(GOOD, conversation, trailing))]
    assert shown == [
        "hi[yo<|endoftext|>]",
        "<role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>[a<|role_end|><|endoftext|>]",
        "<role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>[a<|role_end|>]<role>HUMAN</role>r<|role_end|><|endoftext|>",
    ]


def test_running_text_is_trainable_as_a_whole(load, write, show):
    (e,) = load(write({"text": "the hut <|mask|>"}))
    assert show(e.input_ids_T, e.trainable_T) == "[the hut <|mask|><|endoftext|>]"
    assert MASK not in e.input_ids_T


def test_blank_text_is_refused_with_its_line(load, write):
    path = write({"text": "hi"}, {"text": " \n"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: text is empty"):
        load(path)
    (e,) = examples = load(path, on_bad_row="skip")
    assert e.origin.endswith(":1")
    assert examples.report.refused[Fault.EMPTY].count == 1


def test_an_end_of_turn_that_is_eos_is_enough(load, write, show, tokenizer):
    template = "{%- for m in messages %}{{- m.role[0] ~ m.content ~ eos_token ~ '\n' }}{%- endfor %}"
    template += "{%- if add_generation_prompt %}{{- 'a' }}{%- endif %}"
    (e,) = load(write({"instruction": "hi", "response": "yo"}), encoder=ChatEncoder(tokenizer, template))
    assert show(e.input_ids_T, e.trainable_T) == "uhi<|endoftext|>\na[yo<|endoftext|>]"


def test_token_ids_are_taken_as_they_are(load, write):
    (plain, ended) = load(write(ids(5, 2), ids(5, 2, last=EOS)), encoder=None)
    assert plain.input_ids_T.tolist() == [30, 31, 32, 33, 40]
    assert plain.trainable_T.tolist() == [False, False, True, True, True]
    assert ended.input_ids_T.tolist() == [30, 31, 32, 33, EOS]
    assert plain.input_ids_T.dtype == np.int32


def test_every_document_comes_back_whole(load, write):
    """Marks are kept as bits: lengths that do not fill bytes must not run into each other."""
    lengths = [(3, 1), (9, 4), (1, 0), (17, 16), (8, 0), (31, 5)]
    examples = load(write(*(ids(count, prompt) for count, prompt in lengths)), encoder=None)
    assert [len(e) for e in examples] == examples.length_E.tolist() == [3, 9, 1, 17, 8, 31]
    assert [int((~e.trainable_T).sum()) for e in examples] == [1, 4, 0, 16, 0, 5]
    assert all(not e.trainable_T[:prompt].any() for e, (_, prompt) in zip(examples, lengths, strict=True))
    assert len(examples[-1]) == 31
    with pytest.raises(IndexError):
        examples[6]


def test_block_counts(load, write):
    examples = load(write(ids(9, 4), ids(8, 3), ids(3, 0), ids(4, 3), ids(12, 11)), encoder=None)
    clean_E, response_E = examples.block_counts(4)
    assert response_E.tolist() == [2, 2, 1, 1, 1]
    assert clean_E.tolist() == [2, 1, 0, 0, 2]
    assert examples.block_counts(1)[1].tolist() == [5, 5, 3, 1, 1]


def test_a_document_id_leads_back_to_file_and_line(load, write):
    first = write(b"", GOOD, name="first.jsonl")
    second = write(GOOD, GOOD, name="second.jsonl.gz")
    examples = load(first, second)
    assert examples.document_id_E.tolist() == [2, (1 << 40) + 1, (1 << 40) + 2]
    assert examples.file_index_E.tolist() == [0, 1, 1]
    assert [e.origin for e in examples] == [f"{first}:2", f"{second}:1", f"{second}:2"]
    assert examples.origin((1 << 40) + 2) == f"{second}:2"


@pytest.mark.parametrize(
    "row, message",
    [
        (b"{", "rows.jsonl:2: not valid JSON"),
        ({"prompt": "hi", "completion": 3}, "rows.jsonl:2: completion is int 3"),
        (ids(33, 2), "rows.jsonl:2: the document has 33 tokens, max_length is 32: raise max_length or set overlong"),
        (ids(33, 32), "rows.jsonl:2: the prompt alone has 32 tokens, max_length is 32"),
        (ids(5, 5), "rows.jsonl:2: no token is trainable"),
        (ids(5, 2, last=999), r"rows.jsonl:2: input_ids\[4\] is 999: the vocabulary has 264 tokens"),
        (ids(5, 2, last=MASK), r"rows.jsonl:2: input_ids\[4\] is the mask 2"),
        (GOOD | {"weight": 0}, "rows.jsonl:2: weight is 0: .* must be above 0 and finite.*; leave a record .* out"),
        (GOOD | {"weight": -2.5}, "rows.jsonl:2: weight is -2.5: .* must be above 0"),
        (GOOD | {"weight": 1e400}, "rows.jsonl:2: not valid JSON: Infinity"),
        (ids(5, 2) | {"weight": 1e7}, r"rows.jsonl:2: weight is 10000000.0: .* from 1e-06 to 1e\+06"),
        (GOOD | {"weight": "2"}, "rows.jsonl:2: weight is str '2': .* must be a number above 0, such as 2.0"),
        (GOOD | {"weight": True}, "rows.jsonl:2: weight is bool True: .* must be a number"),
    ],
)
def test_the_first_bad_row_stops_the_run(load, write, row, message):
    with pytest.raises(DataError, match=message) as caught:
        load(write(GOOD, row, b"["))
    assert "on_bad_row: skip" in str(caught.value)


def test_an_earlier_long_row_is_reported_before_a_later_broken_one(load, write):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the document has 33 tokens"):
        load(write(ids(33, 2), b"{"))


def test_bad_rows_are_counted(load, write):
    path = write(GOOD, b"{", ids(33, 2), b"[", GOOD, GOOD, GOOD)
    report = load(path, on_bad_row="skip").report
    assert (report.kept, report.num_refused) == (4, 3)
    assert report.refused[Fault.TOO_LONG].count == 1
    assert report.refused[Fault.JSON].count == 2
    assert report.refused[Fault.JSON].first[1].startswith(f"{path}:4: not valid JSON")
    assert (report.tokens, report.trainable_tokens, report.aligned_tokens, report.longest) == (20, 12, 32, 5)
    assert "4 documents of 1 file(s), 3 rows refused, 0 cut" in str(report)


def test_too_many_bad_rows(load, write):
    path = write(GOOD, b"{", ids(33, 2), b"[")
    with pytest.raises(DataError, match=r"75\.00% of the rows .* max_bad_fraction is 0\.5") as caught:
        load(path, on_bad_row="skip")
    assert f"{path}:2: not valid JSON" in str(caught.value)
    load(path, on_bad_row="skip", max_bad_fraction=0.75)


def test_nothing_left(load, write):
    with pytest.raises(DataError, match=r"no record of .*rows\.jsonl can be trained on"):
        load(write(b"{"), on_bad_row="skip", max_bad_fraction=1.0)


def test_truncation(load, write, show):
    rows = [
        {"prompt": "a" * 4, "completion": "b" * 9},  # cut, no EOS
        {"prompt": "a" * 4, "completion": "b" * 4},  # EOS would be the ninth: dropped
        {"prompt": "a" * 4, "completion": "b" * 3},  # just fits
        {"prompt": "a" * 8, "completion": "b"},  # nothing trainable is left: bad in any case
    ]
    examples = load(write(*rows), max_length=8, overlong="truncate", on_bad_row="skip")
    assert [show(e.input_ids_T, e.trainable_T) for e in examples] == [
        "aaaa[bbbb]",
        "aaaa[bbbb]",
        "aaaa[bbb<|endoftext|>]",
    ]
    assert examples.report.truncated == 2
    assert list(examples.report.refused) == [Fault.PROMPT_TOO_LONG]


def test_refusing_counts_eos(load, write):
    assert len(load(write({"prompt": "aaaa", "completion": "bbb"}), max_length=8)) == 1
    with pytest.raises(DataError, match="has 9 tokens, max_length is 8"):
        load(write({"prompt": "aaaa", "completion": "bbbb"}), max_length=8)


def test_text_needs_a_tokenizer(load, write):
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2 holds text but the model directory has no tokenizer"):
        load(write(ids(3, 1), GOOD), encoder=None)


def test_blocks_divide_max_length(load, write):
    with pytest.raises(ConfigError, match="block_size 5 does not divide max_length 32"):
        load(write(GOOD), block_size=5)


def test_more_records_than_one_batch(load, write):
    rows = [{"prompt": "q", "completion": "x" * (1 + i % 9)} for i in range(2500)]
    examples = load(write(*rows))
    assert examples.length_E.tolist() == [3 + i % 9 for i in range(2500)]
    assert examples.block_counts(4)[1].tolist() == [-(-(3 + i % 9) // 4) for i in range(2500)]
    assert examples[2049].document_id == 2050


def test_the_fingerprint_sees_every_part(load, write):
    base = load(write(ids(5, 2))).fingerprint
    assert load(write(ids(5, 2))).fingerprint == base
    for other in (ids(5, 3), ids(5, 2, last=41), ids(4, 2)):
        assert load(write(other)).fingerprint != base
    assert load(write(b"", ids(5, 2))).fingerprint != base


def test_records_with_a_weight(load, write):
    """Rows of every kind; a null is none. The weight is one of the things that a resumed run must see again."""
    rows = [GOOD, GOOD | {"weight": 2}, ids(5, 2) | {"weight": 0.5}, GOOD | {"weight": None}]
    examples = load(write(*rows))
    assert [examples.unit_weight(index) for index in range(4)] == [1, 2, 0.5, 1]
    assert examples.fingerprint != load(write(*rows[:3], GOOD | {"weight": 3})).fingerprint
    assert load(write(GOOD | {"weight": 1.0})).fingerprint == load(write(GOOD)).fingerprint
    split = load(write({"text": "abcdefghij", "weight": 3}), max_length=8, overlong="split")
    assert [split.unit_weight(index) for index in range(len(split))] == [3, 3]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert load(write(pair, pair | {"weight": 2}), paired=True).unit_weight(1) == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(number):
    """As a table may hold it."""
    with pytest.raises(BadRow, match=f"weight is {number}: .* finite"):
        raise parse_row(GOOD | {"weight": number})


def test_a_stage_that_counts_records_alike_refuses_weights(load, write):
    with pytest.raises(DataError, match=r"rows.jsonl:2: weight is 2: the stage counts every record the same; leave"):
        load(write(GOOD, GOOD | {"weight": 2}), weighed=False)


# --- long texts ------------------------------------------------------------------------------------------------------


def test_a_long_text_goes_on_in_further_documents(load, write):
    """10 tokens and their EOS in documents of 8: names of their own, one origin, EOS at the very end only."""
    path = write({"text": "hi"}, {"text": "abcdefghij"}, ids(20, 0))
    examples = load(path, overlong="split", max_length=8)
    assert [len(e) for e in examples] == [3, 8, 3, 8, 8, 4]
    assert [e.origin.rpartition(":")[2] for e in examples] == ["1", "2", "2", "3", "3", "3"]
    assert [int(d) >> 52 for d in examples.document_id_E] == [0, 0, 1, 0, 1, 2]
    assert len(set(examples.document_id_E.tolist())) == 6
    assert examples.file_index_E.tolist() == [0] * 6
    joined = np.concatenate([examples[1].input_ids_T, examples[2].input_ids_T])
    assert joined.tolist() == [*load(path, max_length=64)[1].input_ids_T]
    assert all(e.trainable_T.all() for e in examples)
    report = examples.report
    assert (report.kept, report.further_parts, report.truncated, report.num_rows) == (6, 3, 0, 3)
    assert "3 go on with a split text" in str(report)


def test_parts_of_later_files_keep_file_and_line(load, write):
    paths = [write({"text": "a"}, name="a.jsonl"), write({"text": "b"}, {"text": "x" * 20}, name="b.jsonl")]
    examples = load(*paths, overlong="split", max_length=8)
    assert examples.file_index_E.tolist() == [0, 1, 1, 1, 1]
    assert [e.origin for e in examples][2:] == [f"{paths[1]}:2"] * 3


def test_what_cannot_be_split(load, write):
    path = write(GOOD, {"prompt": "hi", "completion": "x" * 20})
    with pytest.raises(DataError, match=r"jsonl:2: the document has 23 tokens, max_length is 8, and it has a prompt"):
        load(path, overlong="split", max_length=8)
    endless = {"input_ids": [33] * (8 * 2048 + 1), "prompt_lengths": 0}
    with pytest.raises(DataError, match="would be split into 2049 documents, more than 2048"):
        load(write(endless), overlong="split", max_length=8)
