"""Rollouts of models with full attention: the whole canvas is what each forward saw, and what the learner scores."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from dfactory.commands.generate import output_of, trace_of
from dfactory.data.chat import token_ids
from dfactory.data.prompts import Row
from dfactory.data.records import parse_row
from dfactory.data.traces import TraceRules
from dfactory.decoding import DecodeKeys, DecodeRules, decode
from dfactory.noise import every_transition, state_before
from dfactory.rl.rollouts import ScoredRollout
from dfactory.rl.rows import RolloutRows, rollout_document
from dfactory.rl.source import recorded
from dfactory.types import NEVER, UNDECODED, WHOLE, Answer, FinishReason, Rollout
from tests.families.cases import FAMILIES_WITH_GOLDENS, golden, policy_of

MASK, EOS = 99, 98
FULL = [name for name in FAMILIES_WITH_GOLDENS if policy_of(name).sees_whole_document is not False]

# blocks of 2 after a prompt of 3; EOS in the first one, so that the second stays masked
STOPPED = Rollout(
    prompt_ids=[1, 2, 3],
    token_ids=[10, EOS],
    commit_step=[3, 1],
    commit_logprob=[-0.5, -0.25],
    first_commit_step=[3, 1],
    edits=[],
    block_size=2,
    block_forwards=[4],
    output_ids=[10, EOS],
    forwards=4,
    finish_reason=FinishReason.EOS,
    block_origin=3,
    masks_left=(MASK, MASK),
)


def test_a_rollout_as_a_document():
    document = rollout_document(ScoredRollout(7, 0, STOPPED, 1.0, 1.0), WHOLE)
    assert document.input_ids_T.tolist() == [1, 2, 3, 10, EOS, MASK, MASK]
    assert document.trainable_T.tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert (
        document.commit_step_T.tolist() == [-1] * 3 + [1, 0] + [UNDECODED] * 2
    )  # two of its forwards committed nothing
    assert document.block_size == 7
    assert document.real_T.sum() == 2


def test_its_transitions_by_hand():
    document = rollout_document(ScoredRollout(7, 0, STOPPED, 1.0, 1.0), WHOLE)
    first, second = every_transition(document, 1, MASK)
    assert first.input_ids_P.tolist() == [1, 2, 3, MASK, MASK, MASK, MASK]
    assert np.flatnonzero(first.target_P).tolist() == [4]
    assert second.input_ids_P.tolist() == [1, 2, 3, MASK, EOS, MASK, MASK]
    assert np.flatnonzero(second.target_P).tolist() == [3]
    assert (first.t_P[0], second.t_P[0]) == (1.0, 0.5)  # of the response's two tokens
    (both,) = every_transition(document, 2, MASK)
    assert np.flatnonzero(both.target_P).tolist() == [3, 4]


def test_a_mask_that_is_left_is_no_target():
    """As where decoding ends at EOS before its block is full."""
    early = dataclasses.replace(STOPPED, token_ids=[EOS, MASK], commit_step=[3, NEVER], first_commit_step=[3, NEVER])
    document = rollout_document(ScoredRollout(7, 0, early, 1.0, 1.0), WHOLE)
    assert np.flatnonzero(document.trainable_T).tolist() == [3]
    (view,) = every_transition(document, 1, MASK)
    assert np.flatnonzero(view.target_P).tolist() == [3]
    blockwise = dataclasses.replace(early, block_origin=0, block_size=5, masks_left=())
    document = rollout_document(ScoredRollout(7, 0, blockwise, 1.0, 1.0), 5)
    assert np.flatnonzero(document.trainable_T).tolist() == [3]
    assert document.commit_step_T.tolist() == [-1, -1, -1, 3, UNDECODED]


def canvas_rollouts(name: str, **keys) -> list[Rollout]:
    """Of prompts of several lengths. EOS is a token that comes often, so that some canvases keep masks."""
    case, policy = golden(name), policy_of(name)
    mask = case.expected["mask_token_id"]
    keys = {"max_new_tokens": 12, "suppress_special": False} | keys
    prompts = [list(range(5, 5 + length)) for length in (1, 3, 4, 9, 14)]
    keys = DecodeKeys(**keys).in_blocks_of(None)
    first = decode(policy, prompts, DecodeRules.of(keys, mask_token_id=mask, eos_token_id=mask - 1, canvas=True))
    eos = first[0].token_ids[2]
    found = decode(policy, prompts, DecodeRules.of(keys, mask_token_id=mask, eos_token_id=eos, canvas=True))
    return [rollout for rollout in found if mask not in rollout.token_ids]


@pytest.mark.parametrize(
    "keys",
    [{"block_size": 4, "threshold": 0.1}, {"block_size": 5, "threshold": 0.1}, {"rule": "timed", "time_steps": 8}],
    ids=["blocks", "a short block", "one"],
)
@pytest.mark.parametrize("name", FULL)
def test_learner_and_decoder_give_a_trace_the_same_likelihood(name, keys):
    policy, mask = policy_of(name), golden(name).expected["mask_token_id"]
    rollouts = canvas_rollouts(name, temperature=1.0, acceptance="top", **keys)
    scored = [ScoredRollout(n, 0, rollout, 1.0, 1.0) for n, rollout in enumerate(rollouts)]
    rows = RolloutRows(lambda document, index: (document, every_transition(document, 1, mask)), WHOLE, 400)
    count = 0
    for batch in rows.build(scored):
        with torch.no_grad():
            learner_N = policy.score(batch).logprob_N
        torch.testing.assert_close(learner_N, recorded(batch, scored), atol=2e-5, rtol=1e-5)
        count += batch.num_targets
    assert count == sum(len(rollout.token_ids) for rollout in rollouts)
    assert "block_size" not in keys or any(rollout.masks_left for rollout in rollouts)


@pytest.mark.parametrize("name", FULL[:1])
def test_views_show_what_each_forward_saw(name):
    mask = golden(name).expected["mask_token_id"]
    for number, rollout in enumerate(canvas_rollouts(name, block_size=4, threshold=0.1)):
        document = rollout_document(ScoredRollout(number, 0, rollout, 1.0, 1.0), WHOLE)
        length, prompt = len(document.input_ids_T), len(rollout.prompt_ids)
        views = every_transition(document, 1, mask)
        committing = sorted(set(rollout.commit_step))
        assert len(views) == len(committing)
        for view, step in zip(views, committing, strict=True):
            seen = [*rollout.prompt_ids, *state_before(rollout, step, mask)]
            assert view.input_ids_P.tolist() == seen + [mask] * (length - len(seen))
            assert np.flatnonzero(view.target_P).tolist() == [
                prompt + i for i, s in enumerate(rollout.commit_step) if s == step
            ]


# --- files ------------------------------------------------------------------------------------------------------------


def line_of(rollout: Rollout) -> dict:
    answer = Answer("text", rollout)
    output = output_of(Row("file:1", {}), answer)
    return output | trace_of(output, answer)


def test_a_canvas_through_a_file():
    line = line_of(STOPPED)
    assert (line["block_origin"], line["masks_left"]) == (3, 2)
    record = parse_row(line)
    assert record.trace.canvas
    ids, trainable = TraceRules(WHOLE).whole_canvas(record.trace, *token_ids(record), MASK)
    document = rollout_document(ScoredRollout(7, 0, STOPPED, 1.0, 1.0), WHOLE)
    assert ids.tolist() == document.input_ids_T.tolist()
    assert trainable.tolist() == document.trainable_T.tolist()
    assert record.trace.commit_step_T.tolist() == document.commit_step_T.tolist()


@pytest.mark.parametrize(
    "needed, changed, said",
    [
        (
            2,
            {},
            r"decoded on a canvas \(its block_origin is the length of the prompt\): a block-causal model never sees",
        ),
        (
            WHOLE,
            {"block_origin": 0, "masks_left": ()},
            r"decoded block by block \(block_size 5, block_origin 0\): a model with full",
        ),
    ],
)
def test_traces_of_another_pattern_are_refused(needed, changed, said):
    rollout = dataclasses.replace(STOPPED, block_size=5 if changed else 2, **changed)
    assert re.search(said, str(TraceRules(needed).find_fault(parse_row(line_of(rollout)).trace)))
