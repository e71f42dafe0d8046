"""ELBO estimates against the value enumerated over all masks, for every way to draw views, and exact cases by hand.

The model is the table of tests/enumerated.py.
"""

import itertools

import numpy as np
import pytest
import torch

from dfactory.algorithms.elbo import elbo, elbo_by_view
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, collate
from dfactory.types import AlignedDocument, ViewBatch
from tests.enumerated import (
    IDS,
    LENGTH,
    MASK,
    PROMPT,
    enumerated,
    logprob,
    over_all_t,
    over_pair,
    over_range,
    scored,
    standard_error,
)

DRAWS = 500


def draw(block_size: int, documents: int = DRAWS, low=0.3, high=0.8, **options) -> ViewBatch:
    """The views of many documents that differ in their noise only."""
    make = RandomMask(MASK, seed=7, low=low, high=high, **options)
    trainable = np.arange(LENGTH) >= PROMPT
    aligned = [AlignedDocument(number, IDS, trainable, block_size) for number in range(documents)]
    return collate([[PackedDocument(document, make(document, 0)) for document in aligned]], block_size)


OPTIONS = [
    dict(zip(("per_block", "complementary", "stratified"), choice, strict=True))
    for choice in itertools.product((True, False), repeat=3)
]


@pytest.mark.parametrize("block_size", [3, 6])  # blocks of 1 and 3 response tokens, or one of 4
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(name for name, on in o.items() if on) or "plain")
@pytest.mark.parametrize("mask_count", ["bernoulli", "exact"])
def test_the_mean_of_many_estimates_is_the_enumerated_value(block_size, options, mask_count):
    views = 2
    if mask_count == "exact":
        batch, expected = draw(block_size, num_views=views, mask_count="exact", **options), over_all_t
    else:
        batch = draw(block_size, num_views=views, **options)
        expected = (over_pair if options["complementary"] else over_range)(0.3, 0.8)
    estimates = elbo(batch, scored(batch))
    difference = estimates.mean().item() - enumerated(block_size, expected)
    assert abs(difference) < 3 * standard_error(estimates)


@pytest.mark.parametrize(
    "options", [{"low": 1.0, "high": 1.0}, {"mask_count": "exact", "complementary": True}], ids=["t = 1", "exact pair"]
)
def test_block_size_1_is_the_exact_log_likelihood(options):
    batch = draw(1, documents=5, num_views=2, **options)
    expected = sum(logprob(i, (i,)) for i in range(PROMPT, LENGTH))
    torch.testing.assert_close(elbo(batch, scored(batch)), torch.full((5,), expected), atol=1e-5, rtol=0)


def test_exact_counts_pairs_and_slices_each_lower_the_variance():
    """At equal forwards, over all t (bernoulli from 0.001 on, whose tail nothing bounds)."""

    def deviation(**options):
        batch = draw(3, low=0.001, high=0.999, **options)
        return elbo(batch, scored(batch)).std().item()

    plain = deviation(num_views=4)
    exact = deviation(num_views=4, mask_count="exact")
    pairs = deviation(num_views=2, mask_count="exact", complementary=True)
    slices = deviation(num_views=2, mask_count="exact", complementary=True, stratified=True)
    assert plain > 1.5 * exact
    assert exact > pairs > slices


def test_by_hand_and_by_view():
    """Two documents, a pair of views each."""
    batch = draw(6, documents=2, num_views=1, complementary=True, mask_count="exact")
    value = torch.arange(1.0, batch.num_targets + 1)
    by_hand = [[0.0, 0.0], [0.0, 0.0]]
    for n in range(batch.num_targets):
        by_hand[batch.document_N[n]][batch.view_N[n] - 1] += (batch.elbo_weight_N[n] * value[n]).item()
    torch.testing.assert_close(elbo_by_view(batch, value, 2), torch.tensor(by_hand))
    torch.testing.assert_close(elbo(batch, value), torch.tensor(by_hand).mean(1))
    with pytest.raises(ValueError, match="not 3"):
        elbo_by_view(batch, value, 3)
