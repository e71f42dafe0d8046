"""RolloutSource: rollouts as rows that every rank packs alike, each view once, cursors for resuming."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.engine.replay import join
from dfactory.noise.mask import RandomMask
from dfactory.packing import share_out
from dfactory.rl.rollouts import RolloutBatch, ScoredRollout
from dfactory.rl.rows import rollout_document
from dfactory.rl.source import RolloutSource
from dfactory.types import PADDING, FinishReason, Rollout, TokenScores

BLOCK, MASK = 4, 99


def rollout(prompt: int, response: int, first: int = 10) -> Rollout:
    """A response of whole blocks behind `prompt` tokens, one token committed a forward, left to right."""
    ids = list(range(first, first + response))
    sizes = np.diff([0, *range(BLOCK - prompt % BLOCK, response, BLOCK), response]).tolist()
    return Rollout(
        prompt_ids=[1] * prompt,
        token_ids=ids,
        commit_step=list(range(response)),
        commit_logprob=[-1.0] * response,
        first_commit_step=list(range(response)),
        edits=[],
        block_size=BLOCK,
        block_forwards=sizes,
        output_ids=ids,
        forwards=response,
        finish_reason=FinishReason.LENGTH,
    )


ROLLOUTS = [
    ScoredRollout(group=3, index=0, rollout=rollout(6, 2), reward=1.0, advantage=0.5),
    ScoredRollout(group=3, index=1, rollout=rollout(6, 10), reward=0.0, advantage=-0.5),
    ScoredRollout(group=4, index=0, rollout=rollout(3, 5), reward=1.0, advantage=1.0),
]


# eight rollouts of one prompt of two whole blocks and a token, of three lengths; nothing behind it is alike
GROUP = [
    ScoredRollout(group=5, index=i, rollout=rollout(9, 7 + 4 * (i % 3), first=10 + i), reward=0.0, advantage=i - 3.5)
    for i in range(8)
]


class FakeClient:
    def __init__(self, rollouts=ROLLOUTS):
        self.published, self.asked, self.rollouts = [], [], rollouts

    def publish(self, version, groups):
        self.published.append((version, [sorted(group) for group in groups]))
        return {"seconds/sync": 0.0}

    def next_batch(self, version, next_group):
        self.asked.append((version, next_group))
        return RolloutBatch(self.rollouts, next_group + 2, (next_group + 2) / 8, {"reward": 0.5})


def make_source(client=None, rank=0, world_size=1, **options) -> RolloutSource:
    pairs = RandomMask(mask_id=MASK, seed=1, low=0.3, high=0.8, complementary=True, num_views=2)

    def views(document, index):
        return document, pairs(document, index)

    defaults = {"block_size": BLOCK, "row_length": 64, "micro_batch_rows": 1, "num_iterations": 1}
    weights = lambda: iter([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])  # noqa: E731

    def score(batch):
        logprob_N = -batch.target_ids_N.float()
        return TokenScores(*[logprob_N] * len(TokenScores._fields))

    return RolloutSource(
        client or FakeClient(), weights, score, views, rank=rank, world_size=world_size, **{**defaults, **options}
    )


def targets(windows) -> Counter:
    """(rollout number, advantage, target token) of every target."""
    found = Counter()
    for batch in windows:
        number_N = batch.columns["rollout_D"][batch.document_N].tolist()
        advantage_N = batch.columns["advantage_D"][batch.document_N].tolist()
        found.update(zip(number_N, advantage_N, batch.target_ids_N.tolist(), strict=True))
    return found


def test_every_response_token_is_a_target_once_a_pair():
    window = make_source().next_window()
    expected = Counter()
    for number, scored in enumerate(ROLLOUTS):
        expected.update({(number, scored.advantage, token): 2 for token in scored.rollout.token_ids})
    assert targets(window) == expected


@pytest.mark.parametrize("world_size, micro_batch_rows", [(1, 4), (2, 1), (3, 2)])
def test_ranks_share_the_rollouts(world_size, micro_batch_rows):
    options = {"row_length": 40, "micro_batch_rows": micro_batch_rows, "world_size": world_size}
    windows = [make_source(rank=rank, **options).next_window() for rank in range(world_size)]
    assert len({len(window) for window in windows}) == 1, "all ranks need equally many micro-batches"
    whole = make_source(row_length=40).next_window()
    assert sum((targets(window) for window in windows), Counter()) == targets(whole)


def test_a_sequence_is_whole_on_its_rank():
    """Whatever the ranks and however its views are cut into rows, the sums of a sequence's loss stay what they are."""
    objective = PolicyGradient(level="sequence", normaliser="mean", epsilon=9.0, epsilon_high=9.0)

    def total(**options) -> tuple[float, float]:
        sums = [0.0, 0.0]
        for rank in range(options.get("world_size", 1)):
            whole = join(make_source(rank=rank, **options).next_window())
            logprob_N = whole.columns["old_logprob_N"] + 0.01 * whole.target_ids_N
            term = objective(whole, TokenScores(*[logprob_N] * len(TokenScores._fields))).loss["policy"]
            sums = [sums[0] + term.total.item(), sums[1] + float(term.count)]
        return tuple(sums)

    expected = total()
    assert expected[1] == 3
    for options in ({"row_length": 36}, {"row_length": 24}, {"row_length": 24, "world_size": 2}):
        assert total(**options) == pytest.approx(expected, rel=1e-5), options


def test_rollouts_of_a_group_share_their_prompt():
    (batch,) = make_source(FakeClient(GROUP), row_length=500).next_window()
    alone = [make_source(FakeClient([scored]), row_length=400).next_window() for scored in GROUP]
    assert batch.num_tokens == sum(one.num_tokens for (one,) in alone) - 7 * 8
    assert (batch.trunk_RS[batch.document_RS != PADDING] == 8).all()
    assert sorted(batch.columns["rollout_D"].tolist()) == list(range(8))
    assert batch.columns["advantage_D"].tolist() == [n - 3.5 for n in batch.columns["rollout_D"].tolist()]
    expected = Counter()
    for number, scored in enumerate(GROUP):
        expected.update({(number, scored.advantage, token): 2 for token in scored.rollout.token_ids})
    assert targets([batch]) == expected


@pytest.mark.parametrize("row_length, rows", [(500, 1), (300, 2), (200, 3)])
def test_a_group_too_long_for_a_row_has_its_prompt_in_every_row(row_length, rows):
    """8 positions of the prompt, and 36, 56 or 76 of each rollout."""
    window = make_source(FakeClient(GROUP), row_length=row_length).next_window()
    assert len(window) == rows
    for batch in window:
        trunk_RS = batch.document_RS >= len(batch.document_id_D)
        assert trunk_RS.sum() == 8
        assert batch.position_ids_RS[trunk_RS].tolist() == list(range(8))
    assert sum((targets([batch]) for batch in window), Counter()) == targets(
        make_source(FakeClient(GROUP), row_length=500).next_window()
    )


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_one_group_keeps_all_ranks_busy(world_size):
    options = {"row_length": 400, "world_size": world_size}
    windows = [make_source(FakeClient(GROUP), rank=rank, **options).next_window() for rank in range(world_size)]
    held = [sorted(batch.columns["rollout_D"].tolist()) for (batch,) in windows]
    assert sorted(number for rank in held for number in rank) == list(range(8))
    assert max(map(len, held)) <= -(-8 // world_size) + 1
    for (batch,), numbers in zip(windows, held, strict=True):
        trunk = int((batch.document_RS >= len(batch.document_id_D)).sum())
        assert trunk == (8 if len(numbers) > 1 else 0)


def test_rollouts_whose_prompts_are_hidden_differently_share_nothing():
    """As diffu_grpo does: the clean stream is another one."""
    masks = RandomMask(mask_id=MASK, seed=1, low=0.3, high=0.8)

    def views(document, index):
        ids = document.input_ids_T.copy()
        ids[index % 4] = MASK
        shown = dataclasses.replace(document, input_ids_T=ids)
        return shown, masks(shown, index)

    source = make_source(FakeClient(GROUP[:4]), row_length=400)
    source.rows.make_views = views
    (batch,) = source.next_window()
    assert torch.equal(batch.trunk_RS, batch.document_RS)


def test_shares_of_ranks_are_even():
    assert share_out([5, 9, 3, 4], 2) == [[1, 2], [0, 3]]
    assert share_out([1, 1], 3) == [[0], [1], []]


def test_a_rollout_whose_views_do_not_fit_one_row_is_shared_out():
    window = make_source(row_length=24).next_window()
    share = Counter()
    for batch in window:
        for number, part in zip(batch.columns["rollout_D"].tolist(), batch.columns["share_D"].tolist(), strict=True):
            share[number] += part
    assert dict(share) == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0})
    assert len(window) > 2


def test_weights_are_published_before_the_rollouts_are_asked_for():
    client = FakeClient()
    source = make_source(client, num_iterations=2)
    for _ in range(4):
        source.next_window()
    assert client.published == [(0, [["a"], ["b"]]), (2, [["a"], ["b"]])]
    assert client.asked == [(0, 0), (2, 2)]
    assert source.epoch == 0.5
    assert source.metrics == {"reward": 0.5, "seconds/sync": 0.0}
    resumed = make_source(client)
    resumed.load_state_dict(source.state_dict())
    resumed.next_window()
    assert client.asked[-1] == (4, 4)


def test_the_old_log_probabilities_are_those_of_the_policy_now():
    for batch in make_source().next_window():
        assert batch.columns["old_logprob_N"].tolist() == (-batch.target_ids_N.float()).tolist()


def test_real_tokens_of_a_rollout_end_with_its_answer():
    """What the decoder wrote after EOS, or after max_new_tokens, is fill."""
    for answer in (1, 4, 10):
        scored = dataclasses.replace(
            ROLLOUTS[1], rollout=dataclasses.replace(ROLLOUTS[1].rollout, output_ids=list(range(answer)))
        )
        assert np.flatnonzero(rollout_document(scored, BLOCK).real_T).tolist() == list(range(6, 6 + answer))


@pytest.mark.parametrize("train_after_eos, last", [(True, 10), (False, 3)])
def test_what_stands_after_eos_is_a_target_only_if_asked(train_after_eos, last):
    """An answer of 3 tokens in 10: the others stay in the views, as context."""
    whole = rollout(6, 10)
    ended = dataclasses.replace(whole, output_ids=whole.token_ids[:3], finish_reason=FinishReason.EOS)
    scored = ScoredRollout(group=3, index=0, rollout=ended, reward=1.0, advantage=0.5)
    (batch,) = make_source(FakeClient([scored]), train_after_eos=train_after_eos).next_window()
    assert sorted(set(batch.target_ids_N.tolist())) == ended.token_ids[:last]
    assert batch.columns["target_number_N"].tolist() == list(range(2 * last))
    assert batch.answer_length_D.tolist() == [3]
    shown = set(batch.input_ids_RS.flatten().tolist())
    assert shown >= set(ended.token_ids[3:]) or train_after_eos


def test_a_rollout_as_a_document():
    document = rollout_document(ROLLOUTS[1], BLOCK)
    assert document.trainable_T.tolist() == [False] * 6 + [True] * 10
    assert document.commit_step_T.tolist() == [-1] * 6 + [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
