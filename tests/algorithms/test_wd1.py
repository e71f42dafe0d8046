"""wd1 by hand, on four targets of two rollouts, and its weights."""

import math

import numpy as np
import pytest

from dfactory.algorithms import ALGORITHMS
from dfactory.algorithms.wd1 import WeightedLikelihood
from dfactory.recipe import Recipe
from tests.algorithms.test_dpo import scores
from tests.algorithms.test_policy_gradient import FOUR, OLD


def test_weights_are_the_difference_of_two_softmaxes():
    """Advantages 1, 0, -1 and psi ln 2: softmax of (2, 1, 1/2) minus softmax of (1/2, 1, 2), times 3 rollouts."""
    recipe = Recipe(stage="rl", policy_loss="wd1", psi=math.log(2))
    found = ALGORITHMS["wd1"].weights(recipe, np.array([1.0, 0.0, -1.0]))
    assert found == pytest.approx([3 * 1.5 / 3.5, 0, -3 * 1.5 / 3.5])
    assert found.sum() == pytest.approx(0)


def test_four_tokens():
    """Weights 2 and -1, 4 and 2 real tokens; the weights of ELBO views have no part in it."""
    total, count = WeightedLikelihood()(FOUR, scores(OLD)).loss["policy"]
    assert total.item() == pytest.approx(-(2 * (-1 - 2) / 4 + -1 * (-3 - 0.5) / 2))
    assert count == 2


def test_no_old_policy_is_asked_for():
    recipe = Recipe(stage="rl", policy_loss="wd1", max_staleness=4)
    assert not recipe.algorithm.needs(recipe).old_logprob
    assert not recipe.actors_score
