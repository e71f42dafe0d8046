"""Transitions of a trace by hand and against the decoder; states rebuilt against those that it really passed through."""

import collections

import numpy as np
import pytest
import torch

from dfactory.data.chat import token_ids
from dfactory.data.records import parse_row
from dfactory.decoding import DecodeRules, decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.registry import load_policy
from dfactory.models.tiny import write_tiny_config
from dfactory.noise import TraceViews, block_of_step, every_transition, state_after, state_before, transition_view
from dfactory.packing import PackedDocument, collate
from dfactory.types import AlignedDocument, Edit, FinishReason, Rollout
from tests.decoding.conftest import sharpen

MASK, EOS = 159, 156  # of the random model


#                     prompt      block 0    block 1           block size 4
STEPS = np.array([-1, -1, -1, -1, -1, -1, 1, 0, 2, 0, 0, 1], np.int16)
IDS = np.arange(10, 22, dtype=np.int32)
__ = 159


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = write_tiny_config(tmp_path_factory.mktemp("model"))
    return sharpen(load_policy(directory, dtype="float32", init_weights="random"))


def trace_document(document_id: int = 3) -> AlignedDocument:
    return AlignedDocument(document_id, IDS, STEPS >= 0, 4, STEPS)


# --- transitions ------------------------------------------------------------------------------------------------------


def test_transitions_by_hand():
    first, second, third = every_transition(trace_document(), 1, MASK)
    assert first.position_P.tolist() == second.position_P.tolist() == list(range(4, 12))
    assert first.input_ids_P.tolist() == [14, 15, __, __, __, __, __, __]
    assert first.target_P.tolist() == [False, False, False, True, False, True, True, False]
    assert second.input_ids_P.tolist() == [14, 15, __, 17, __, 19, 20, __]
    assert second.target_P.tolist() == [False, False, True, False, False, False, False, True]
    assert third.position_P.tolist() == [8, 9, 10, 11]  # the other block has two transitions
    assert third.input_ids_P.tolist() == [__, 19, 20, 21]
    assert third.target_P.tolist() == [True, False, False, False]
    assert first.t_P.tolist() == [1] * 8
    assert second.t_P.tolist() == [0.5] * 8  # one of two response tokens, two of four
    assert third.t_P.tolist() == [0.25] * 4


def test_a_stride_takes_steps_together():
    first, second = every_transition(trace_document(), 2, MASK)
    assert first.target_P.tolist() == [False, False, True, True, False, True, True, True]
    assert first.input_ids_P.tolist() == [14, 15, __, __, __, __, __, __]
    assert second.position_P.tolist() == [8, 9, 10, 11]
    assert second.target_P.tolist() == [True, False, False, False]
    (only,) = every_transition(trace_document(), 3, MASK)
    assert (only.target_P == (STEPS[4:] >= 0)).all()


def test_each_block_stands_at_its_own_transition():
    view = transition_view(trace_document(), np.array([1, 0]), 1, MASK, weight=np.array([2, 3]))
    assert view.input_ids_P.tolist() == [14, 15, __, 17, __, __, __, __]
    assert view.target_P.tolist() == [False, False, True, False, False, True, True, False]
    assert view.elbo_weight_P.tolist() == [2] * 4 + [3] * 4


def random_traces(count: int, block_size: int = 4) -> list[AlignedDocument]:
    """Documents of 1 to 4 response blocks, each with steps 0 .. n - 1 in any order."""
    draw = np.random.default_rng(0)
    documents = []
    for number in range(count):
        blocks, prompt = draw.integers(1, 5), draw.integers(0, block_size)
        steps = []
        for block in range(blocks):
            open_positions = block_size - (prompt if block == 0 else 0)
            forwards = draw.integers(1, open_positions + 1)
            taken = np.concatenate([np.arange(forwards), draw.integers(0, forwards, open_positions - forwards)])
            steps += [-1] * (block_size - open_positions) + draw.permutation(taken).tolist()
        steps = np.array(steps, np.int16)
        documents.append(
            AlignedDocument(number, draw.integers(0, 99, len(steps)).astype(np.int32), steps >= 0, block_size, steps)
        )
    return documents


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_response_token_is_a_target_once_and_sees_what_came_before(stride):
    for document in random_traces(50):
        seen = np.zeros(len(document.input_ids_T), int)
        for view in every_transition(document, stride, MASK):
            seen[view.position_P[view.target_P]] += 1
            steps = document.commit_step_T[view.position_P].reshape(-1, 4)
            targets, masked = view.target_P.reshape(-1, 4), (view.input_ids_P == MASK).reshape(-1, 4)
            for s, target, mask in zip(steps, targets, masked, strict=True):
                now = s[target]
                assert len(now) > 0
                assert now.max() - now.min() < stride
                assert (mask == (s >= now.min() - now.min() % stride)).all()
            visible = view.input_ids_P != MASK
            assert (view.input_ids_P[visible] == document.input_ids_T[view.position_P[visible]]).all()
        assert (seen == document.trainable_T).all()


@pytest.mark.parametrize("stride, num_views, stratified", [(1, 1, False), (2, 1, False), (1, 3, True)])
def test_drawn_transitions_estimate_the_sum_over_all(stride, num_views, stratified):
    """Any number a target: here one that depends on position and on what the view shows."""

    def value(view):
        block = view.position_P // 4
        shown = np.array([((view.input_ids_P != MASK) & (block == here)).sum() for here in block])
        return (view.elbo_weight_P * view.target_P * (1 + view.position_P + shown**2)).sum()

    maker = TraceViews(MASK, seed=1, stride=stride, num_views=num_views, stratified=stratified)
    for document in random_traces(3):
        exact = sum(value(view) for view in every_transition(document, stride, MASK))
        drawn = [np.mean([value(view) for view in maker(document, visit)]) for visit in range(500)]
        assert np.mean(drawn) == pytest.approx(exact, abs=4.5 * np.std(drawn) / 500**0.5 + 1e-6)


def test_draws_are_a_function_of_seed_document_visit_and_view():
    def drawn(seed=1, document_id=3, visit=0, num_views=4):
        views = TraceViews(MASK, seed, num_views=num_views)(trace_document(document_id), visit)
        return [view.input_ids_P.tolist() for view in views]

    assert drawn() == drawn()
    assert drawn(num_views=2) == drawn()[:2]
    assert len({str(drawn(**change)) for change in ({}, {"seed": 2}, {"document_id": 4}, {"visit": 1})}) == 4
    assert drawn()[0] != drawn()[1] or drawn()[1] != drawn()[2]


def test_stratified_views_take_their_own_parts():
    """Three transitions, three views: each gets one."""
    maker = TraceViews(MASK, seed=1, num_views=3, stratified=True)
    for visit in range(20):
        masks = [(view.input_ids_P[4:] == MASK).sum() for view in maker(trace_document(), visit)]
        assert masks == [4, 2, 1]


@pytest.mark.parametrize(
    "keys", [{"threshold": 0.5}, {"threshold": 0.7, "temperature": 1.0, "acceptance": "top"}], ids=str
)
def test_transitions_score_what_the_decoder_scored(policy, keys):
    """Stride 1: the log-probabilities under all views are those that decoding recorded, so they sum to the trace's."""
    keys = {
        "block_size": 4,
        "max_new_tokens": 12,
        "suppress_special": False,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
    } | keys
    prompts = [list(range(5, 5 + length)) for length in (1, 3, 4, 9, 14)]
    checked = 0
    for rollout in decode(policy, prompts, DecodeRules.of(DecodeKeys(**keys))):
        if MASK in rollout.token_ids:
            continue
        row = {"prompt_ids": rollout.prompt_ids, "token_ids": rollout.token_ids, "commit_step": rollout.commit_step}
        record = parse_row(row | {"block_size": 4})
        ids, trainable = token_ids(record)
        document = AlignedDocument(0, ids, trainable, 4, record.trace.commit_step_T)
        views = every_transition(document, 1, MASK)
        with torch.no_grad():
            scores = policy.score(collate([[PackedDocument(document, views)]], 4))
        position = np.concatenate([view.position_P[view.target_P] for view in views])
        recorded = np.array(rollout.commit_logprob)[position - len(rollout.prompt_ids)]
        np.testing.assert_allclose(scores.logprob_N.numpy(), recorded, atol=1e-4)
        assert sorted(position) == list(range(len(rollout.prompt_ids), len(ids)))
        checked += rollout.forwards < len(rollout.token_ids)
    assert checked > 1


# --- states -----------------------------------------------------------------------------------------------------------


def recorded_states(policy, prompts, rules, drafts=None):
    """The rollouts, and for each of them the token ids that `on_step` told after every forward."""
    heard = collections.defaultdict(list)
    rollouts = decode(policy, prompts, rules, drafts=drafts, on_step=lambda p: heard[p.prompt].append(p.token_ids))
    return [(rollout, heard[index]) for index, rollout in enumerate(rollouts)]


def check_states(rollout: Rollout, after: list[list[int]], mask: int, draft: list[int] = ()) -> None:
    """Every state before and after every forward, and the block that it ran on, by lengths and by what was heard."""
    known: list[int] = []  # the last state that was heard
    for step in range(rollout.forwards):
        end = len(after[step])  # of the block
        before = [*known, *draft[len(known) : end]]
        before += [mask] * (end - len(before))
        assert state_before(rollout, step, mask).tolist() == before, step
        assert state_after(rollout, step, mask).tolist() == after[step], step
        assert (block_of_step(rollout, step) + 1) * rollout.block_size == len(rollout.prompt_ids) + end
        known = after[step]
    assert known == rollout.token_ids
    with pytest.raises(IndexError):
        state_before(rollout, rollout.forwards, mask)


@pytest.mark.parametrize(
    "keys",
    [
        {"threshold": 0.9},
        {"threshold": 0.3, "block_size": 4, "min_commit": 2},
        {"threshold": 0.6, "temperature": 1.0, "acceptance": "top"},
        {"threshold": 1.0, "steps": 3, "step_schedule": "ascending", "eos_penalty": 0.6},
        {"threshold": 0.7, "editing_threshold": 0.5},
        {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 3},
        {"threshold": 0.3, "editing_threshold": 0.1, "temperature": 1.0, "block_size": 4},
    ],
    ids=str,
)
def test_every_state_of_real_decoding(policy, keys):
    keys = {"block_size": 8, "max_new_tokens": 24, "mask_token_id": MASK, "eos_token_id": EOS} | keys
    rules = DecodeRules.of(DecodeKeys(**keys))
    pairs = recorded_states(policy, [list(range(5, 5 + length)) for length in (1, 3, 8, 13, 30)], rules)
    for rollout, after in pairs:
        check_states(rollout, after, MASK)
    edits = sum(len(rollout.edits) for rollout, _ in pairs)
    assert edits > 10 if "editing_threshold" in keys else edits == 0


def test_states_of_a_decoding_that_began_with_a_draft(policy):
    keys = {"block_size": 4, "max_new_tokens": 20, "threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 3}
    rules = DecodeRules.of(DecodeKeys(**keys, mask_token_id=MASK, eos_token_id=EOS))
    drafts = [[], [9], [5, MASK, 7, 8, MASK, 10, 11, 12, 13, 14, 15], list(range(20, 40))]
    pairs = recorded_states(policy, [[1, 2], [3, 4, 5], [6, 7], [8, 9]], rules, drafts)
    for (rollout, after), draft in zip(pairs, drafts, strict=True):
        check_states(rollout, after, MASK, draft)
    assert sum(edit.old_id == 20 + edit.index for edit in pairs[3][0].edits) > 3


def test_states_where_the_mask_may_be_emitted(policy, monkeypatch):
    """As LLaDA2's own code: a committed token may be edited back into the mask, and masks may be left."""
    weight = policy.model.lm_head.weight.detach().clone()
    weight[MASK] *= 3
    monkeypatch.setattr(policy.model.lm_head, "weight", torch.nn.Parameter(weight))
    keys = {"block_size": 8, "max_new_tokens": 32, "threshold": 0.0, "editing_threshold": 0.0, "max_post_steps": 3}
    keys |= {"temperature": 1.0, "suppress_special": False, "mask_token_id": MASK, "eos_token_id": EOS}
    kinds = collections.Counter()
    for min_commit in (1, 8):
        rules = DecodeRules.of(DecodeKeys(min_commit=min_commit, **keys))
        for rollout, after in recorded_states(policy, [[n, n + 1, n + 2] for n in range(12)], rules):
            check_states(rollout, after, MASK)
            kinds["to mask"] += sum(edit.new_id == MASK for edit in rollout.edits)
            kinds["from mask"] += sum(edit.old_id == MASK for edit in rollout.edits)
            kinds["left"] += rollout.token_ids.count(MASK)
    assert min(kinds["to mask"], kinds["from mask"], kinds["left"]) > 5, kinds


def test_the_example_of_the_docstring():
    """types.Rollout: a cat becomes a dog in the third forward."""
    a, cat, dog, ran, stop, eos, mask = range(10, 17)
    rollout = Rollout(
        prompt_ids=[1, 2],
        token_ids=[a, dog, ran, stop, eos, eos],
        commit_step=[0, 2, 5, 4, 4, 4],
        commit_logprob=[0.0] * 6,
        first_commit_step=[0, 1, 5, 4, 4, 4],
        edits=[Edit(1, 2, cat, dog)],
        block_size=4,
        block_forwards=[4, 3],
        output_ids=[a, dog, ran, stop, eos],
        forwards=7,
        finish_reason=FinishReason.EOS,
    )
    states = [state_before(rollout, step, mask).tolist() for step in range(7)]
    assert states == [
        [mask, mask],
        [a, mask],
        [a, cat],
        [a, dog],
        [a, dog, mask, mask, mask, mask],
        [a, dog, mask, stop, eos, eos],
        [a, dog, ran, stop, eos, eos],
    ]
    assert [block_of_step(rollout, step) for step in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    assert state_after(rollout, 3, mask).tolist() == [a, dog]
