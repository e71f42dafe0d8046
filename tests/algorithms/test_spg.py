"""Sandwiched policy gradient: its upper bound against enumeration and an obvious loop; its loss by hand; its two passes."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from dfactory.algorithms.rollouts import rollout_views
from dfactory.algorithms.spg import SandwichedPolicyGradient
from dfactory.engine.replay import replay
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, collate
from dfactory.recipe import Recipe
from dfactory.types import AlignedDocument, TokenScores, ViewBatch
from tests import enumerated

LOW, HIGH, POWER = 0.3, 0.8, 1.5
SPG = SandwichedPolicyGradient(0.25, POWER)


def rows_of(count: int, advantages: list[float], per_row: int, **noise) -> list[ViewBatch]:
    """A micro-batch for each `per_row` views of each of `count` copies of the enumerated document."""
    trainable = np.arange(enumerated.LENGTH) >= enumerated.PROMPT
    masks = RandomMask(enumerated.MASK, seed=7, low=LOW, high=HIGH, **noise)
    make, batches = rollout_views(Recipe(stage="rl", policy_loss="spg"), masks), []
    for number in range(count):
        document, views = make(AlignedDocument(number, enumerated.IDS, trainable, 3), 0)
        parts = [views[start : start + per_row] for start in range(0, len(views), per_row)]
        for part in parts:
            batch = collate([[PackedDocument(document, part)]], 3)
            batches.append(
                batch.with_columns(
                    advantage_D=torch.tensor([advantages[number]]),
                    rollout_D=torch.tensor([number]),
                    share_D=torch.tensor([1 / len(parts)]),
                )
            )
    return batches


def scored(logprob_N: torch.Tensor) -> TokenScores:
    other = torch.zeros_like(logprob_N).detach()
    return TokenScores(logprob_N, other, other.bool(), other.long(), other)


def test_the_upper_bound_is_the_enumerated_one():
    [batch] = rows_of(1, [1.0], 4000, num_views=4000)
    found = SPG.eubo(batch, enumerated.scored(batch)).item()
    coefficient, expected = enumerated.over_range(LOW, HIGH), 0.0
    for start in (0, 3):
        response = range(max(start, enumerated.PROMPT), start + 3)
        for i in response:
            others = [j for j in response if j != i]
            sets = [(i, *rest) for size in range(len(others) + 1) for rest in itertools.combinations(others, size)]
            mean = sum(
                coefficient(len(response), len(s)) * math.exp(POWER * enumerated.logprob(i, tuple(sorted(s))))
                for s in sets
            )
            expected += math.log(mean) / POWER
    assert found == pytest.approx(expected, abs=0.05)


def slow_eubo(batch: ViewBatch, logprob_N: torch.Tensor) -> float:
    terms = defaultdict(float)
    position_N = batch.position_ids_RS.flatten()[batch.target_index_N]
    for position, weight, logprob in zip(position_N.tolist(), batch.elbo_weight_N, logprob_N, strict=True):
        terms[position] = terms[position] + weight * torch.exp(POWER * logprob)
    return sum(torch.log(term) for term in terms.values()) / POWER


@pytest.mark.parametrize("advantage", [2.0, -1.0])
def test_the_loss_takes_the_bound_on_the_side_of_the_advantage(advantage):
    [batch] = rows_of(1, [advantage], 6, num_views=3, complementary=True)
    logprob_N = enumerated.scored(batch)
    elbo, eubo = (batch.elbo_weight_N * logprob_N).sum(), slow_eubo(batch, logprob_N)
    likelihood = elbo if advantage > 0 else 0.25 * eubo + 0.75 * elbo
    terms = SPG(batch, scored(logprob_N))
    assert terms.loss["policy"].total.item() == pytest.approx(-(advantage * likelihood / 4).item(), rel=1e-5)
    assert terms.loss["policy"].count == 1


def test_improbable_tokens_have_a_finite_gradient():
    """p^b underflows at 100 nats; the sum runs relative to the largest term of a position."""
    [batch] = rows_of(1, [-1.0], 4, num_views=4)
    logprob_N = torch.full((batch.num_targets,), -100.0, requires_grad=True)
    total = SPG(batch, scored(logprob_N)).loss["policy"].total
    total.backward()
    assert total.isfinite()
    assert logprob_N.grad.isfinite().all()
    assert logprob_N.grad.sum() > 0


def test_views_in_several_rows_are_one_rollout():
    """The loss and the gradients of two passes over cut rows, against those of whole ones."""
    found = []
    for per_row in (8, 3):
        batches = rows_of(2, [1.5, -1.0], per_row, num_views=4, complementary=True)
        leaves = [enumerated.scored(batch).clone().requires_grad_() for batch in batches]
        objective, window = replay(SPG, batches, [scored(leaf.detach()) for leaf in leaves])
        terms = [objective(batch, scored(leaf)) for batch, leaf in zip(window, leaves, strict=True)]
        total = sum(term.loss["policy"].total for term in terms)
        total.backward()
        found.append((total.item(), torch.cat([leaf.grad for leaf in leaves])))
    (whole, whole_N), (cut, cut_N) = found
    assert cut == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(cut_N, whole_N)
