"""Two passes over several micro-batches give the loss and the gradient of one whole graph."""

import dataclasses

import numpy as np
import pytest
import torch

from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.algorithms.sft import SFT
from dfactory.algorithms.wd1 import WeightedLikelihood
from dfactory.engine.replay import join, replay
from dfactory.engine.window import micro_loss, window_counts, with_gradient
from dfactory.models.registry import load_policy
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, align, collate, share
from dfactory.types import PADDING, Example
from dfactory.visibility import dense_mask
from tests.batches import make_batch, random_document
from tests.engine.conftest import GOLDEN

VOCABULARY = 160
OBJECTIVES = {
    "sequence": PolicyGradient(level="sequence", normaliser="mean", epsilon=0.05, epsilon_high=0.05),
    "sum": PolicyGradient(level="sequence", normaliser="sum", epsilon=10.0, epsilon_high=10.0, kl_coef=0.1),
    "unconditional": PolicyGradient("sequence", normaliser="block", clip="unconditional", epsilon=0.5, kl_coef=0.1),
    "tokens": PolicyGradient(level="token", aggregation="grpo", kl_coef=0.1, kl_estimator="k2"),
}


@pytest.fixture(scope="module")
def policy():
    return load_policy(GOLDEN, dtype="float32")


@pytest.fixture(scope="module")
def window(policy):
    """Four micro-batches, the last one empty; two rollouts, each with its views in several of them."""
    generator = torch.Generator().manual_seed(1)
    documents = [random_document(generator, 12, 4, 3, VOCABULARY, prompt=3) for _ in range(2)]
    batches = []
    for part in range(3):
        row = [dataclasses.replace(document, views=[document.views[part]]) for document in documents]
        batch = make_batch([row])
        old_N = policy(batch).logprob_N.detach() + 0.3 * torch.randn(batch.num_targets, generator=generator)
        batches.append(
            dataclasses.replace(batch, response_length_D=torch.tensor([9, 9])).with_columns(
                advantage_D=torch.tensor([1.0, -0.7]),
                rollout_D=torch.tensor([4, 9]),
                share_D=torch.full((2,), 1 / 3),
                response_blocks_D=torch.tensor([3, 3]),
                old_logprob_N=old_N,
                reference_logprob_N=old_N + 0.1,
            )
        )
    empty = collate([[]], 4)
    columns = {name: column[:0] for name, column in batches[0].columns.items()}
    return [*batches, empty.with_columns(**columns)]


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_passes_equal_the_whole_graph(policy, window, name):
    objective = OBJECTIVES[name]
    scores = [policy(batch) for batch in window]
    whole = join(window)
    joined = type(scores[0])(*(torch.cat(field) for field in zip(*scores, strict=True)))
    counts = window_counts(objective, [whole], [joined], lambda total: None)
    expected_loss = micro_loss(objective(whole, joined), counts, 1)
    expected = gradients(policy, expected_loss)

    with torch.no_grad():
        ahead = [policy(batch) for batch in window]
    second, batches = replay(objective, window, ahead)
    assert window_counts(second, batches, [None] * 4, lambda total: None) == pytest.approx(counts)
    policy.zero_grad()
    losses, gaps = [], []
    for batch in batches:
        terms = second(batch, policy(batch))
        loss = micro_loss(terms, counts, 1)
        loss.backward()
        losses.append(loss.item())
        gaps.append(terms.metrics["replay_gap"].total.item())
    actual = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert sum(losses) == pytest.approx(expected_loss.item(), rel=1e-5)
    assert (actual - expected).norm() / expected.norm() < 1e-5
    assert max(gaps) < 1e-4  # the two passes compute the same


LINEAR = {
    "sft": SFT("elbo"),
    "wd1": WeightedLikelihood(),
    "tokens": PolicyGradient(aggregation="dapo"),
    "sequence": PolicyGradient(level="sequence", normaliser="sum", clip="unconditional"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_gradient_of_a_linear_loss_is_known_before_the_forward(policy, window, name):
    """To the bit, where no step lies between; and the head has made its own gradients from it."""
    objective, batch = LINEAR[name], window[0]
    assert "gradient_N" not in with_gradient(batch, PolicyGradient(), {"policy": 3.0}, 2).columns
    columns = {name: column for name, column in batch.columns.items() if name != "old_logprob_N"}
    batch = dataclasses.replace(batch, columns=columns)
    counts = dict.fromkeys(objective.counts(batch, policy(batch)), 3.0)
    known = with_gradient(batch, objective, counts, 2)
    scores = policy(known)
    scores.logprob_N.retain_grad()
    found = gradients(policy, micro_loss(objective(batch, scores), counts, 2))
    assert torch.equal(scores.logprob_N.grad, known.columns["gradient_N"])
    expected = gradients(policy, micro_loss(objective(batch, policy(batch)), counts, 2))
    torch.testing.assert_close(found, expected)


def test_joined_micro_batches_keep_their_trunks():
    """Numbers of trunks must not become those of documents: everybody sees as many positions as before."""
    ids = np.arange(20, dtype=np.int32)
    document = align(Example(1, ids, np.arange(20) >= 9), 4, eos_id=0)
    pair = share([PackedDocument(document, RandomMask(159, seed=1, low=0.5, high=0.5)(document, n)) for n in (0, 1)])
    window = [collate([pair, pair[:1]], 4), collate([[]], 4), collate([pair[:1], pair], 4)]
    seen = torch.cat([dense_mask(batch.place_RS).sum(-1).flatten() for batch in window])
    whole = join(window)
    assert torch.equal(dense_mask(whole.place_RS).sum(-1).flatten(), seen)
    assert whole.document_N.unique().tolist() == list(range(6))
    assert sorted(set(whole.document_RS.unique().tolist()) - set(range(6))) == [PADDING, 6, 10]


def test_passes_that_differ_are_told(window, policy):
    with torch.no_grad():
        scores = [policy(batch) for batch in window]
    second, batches = replay(OBJECTIVES["sequence"], window, scores)
    other = scores[0]._replace(logprob_N=scores[0].logprob_N + 0.25)
    gap = second(batches[0], other).metrics["replay_gap"]
    assert gap.total.item() / gap.count == pytest.approx(0.25, rel=1e-5)
