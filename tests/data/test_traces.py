"""Decoder traces as records: their steps are kept, wrong answers left out, and what cannot be a view is refused."""

import dataclasses

import pytest

from dfactory.data.traces import NO_TRACES, TraceRules
from dfactory.errors import DataError
from dfactory.packing import align
from tests.data.conftest import EOS

GOOD = {"prompt": "hi", "completion": "yo"}
NEEDED = TraceRules(block_size=4)
TRACE = {
    "prompt_ids": [30, 31],
    "token_ids": [32, 33, 34, 35, 36, 1],
    "commit_step": [1, 0, 2, 2, 3, 4],
    "block_size": 4,
}
STEPS = [-1, -1, 1, 0, 0, 0, 1, 2]


def test_traces_carry_their_steps(load, write):
    short = {**TRACE, "token_ids": [40, 41], "commit_step": [0, 0]}
    examples = load(write(TRACE, short, TRACE), traces=NEEDED)
    assert [e.commit_step_T.tolist() for e in examples] == [STEPS, [-1, -1, 0, 0], STEPS]
    assert examples[0].input_ids_T.tolist() == [30, 31, 32, 33, 34, 35, 36, 1]  # no EOS is added
    assert examples[1].input_ids_T.tolist() == [30, 31, 40, 41]
    assert examples[0].trainable_T.tolist() == [step >= 0 for step in STEPS]
    assert align(examples[0], 4, EOS).commit_step_T.tolist() == STEPS
    (cut,) = load(write(TRACE), traces=NEEDED, max_length=4, overlong="truncate")
    assert cut.commit_step_T.tolist() == STEPS[:4]


def test_steps_belong_to_the_fingerprint(load, write):
    other = {**TRACE, "commit_step": [0, 1, 2, 2, 3, 4]}
    seen = [load(write(row), traces=need).fingerprint for row in (TRACE, other) for need in (NEEDED, NO_TRACES)]
    assert seen[0] != seen[2]
    assert seen[1] == seen[3]  # nobody looks at them


def test_wrong_traces_are_left_out_and_counted(load, write):
    path = write({**TRACE, "correct": False}, TRACE, {**TRACE, "correct": True})
    for rules in (NEEDED, NO_TRACES):
        examples = load(path, traces=rules)
        assert examples.document_id_E.tolist() == [2, 3]
        assert examples.report.left_out == 1
        assert examples.report.num_refused == 0
        assert "1 traces left out, their response is not correct (trace_filter)" in str(examples.report)
        assert len(load(path, traces=dataclasses.replace(rules, only_correct=False))) == 3
    with pytest.raises(DataError, match=r"no record .*\n.*\n.*\n1 traces left out"):
        load(write({**TRACE, "correct": False}))


@pytest.mark.parametrize(
    "row, message",
    [
        (GOOD, "the record has no commit_step: view_source trace needs what `dfactory generate --keep-trace` wrote"),
        ({**TRACE, "block_size": 2}, "block_size is 2, the recipe's is 4: decode with decode.block_size=4"),
        ({**TRACE, "edits": [{"index": 0}]}, "the trace has edits"),
        ({**TRACE, "commit_step": [1, 0, 2, 2, 3, -1]}, r"commit_step\[5\] is -1: a mask was left there; decode with"),
        ({**TRACE, "token_ids": [32, 2, 34, 35, 36, 1]}, r"input_ids\[3\] is the mask 2"),
    ],
)
def test_traces_that_cannot_be_views(load, write, row, message):
    path = write(TRACE, row)
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {message}"):
        load(path, traces=NEEDED)
    if message.startswith(("block", "the trace")):
        assert len(load(path)) == 2  # as tokens to mask at random they will do
