"""How much of an epoch each file gets, and in which order its records come: by temperature, and from short to long."""

import numpy as np
import pytest

from dfactory.data.order import EpochOrder, tempered
from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from tests.commands.conftest import ROOT


def test_a_temperature_flattens_the_shares_of_an_epoch():
    assert tempered([1.0, 1.0], [900, 100], 2.0) == pytest.approx([5 / 6, 2.5])  # shares 3/4 and 1/4 of 1000
    assert tempered([1.0, 2.0], [300, 50], 1.0) == [1.0, 2.0]
    even = tempered([1.0, 1.0, 0.5], [900, 100, 0], 1e9)
    assert [even[0] * 900, even[1] * 100] == pytest.approx([500, 500])
    assert even[2] == 0.5


def test_an_epoch_by_temperature_draws_what_it_says():
    weights = np.repeat(tempered([1.0, 1.0], [900, 100], 2.0), [900, 100])
    counts = [np.bincount(EpochOrder(weights, 1).visits(epoch)[0] // 900, minlength=2) for epoch in range(8)]
    assert np.mean(counts, axis=0) == pytest.approx([750, 250], rel=0.05)


def test_the_first_epoch_goes_from_short_to_long():
    length_U = np.array([5, 1, 3, 1, 5, 2])
    ordered, plain = EpochOrder(np.ones(6), 7, length_U), EpochOrder(np.ones(6), 7)
    assert length_U[ordered.visits(0)[0]].tolist() == [1, 1, 2, 3, 5, 5]
    assert ordered.visits(1)[0].tolist() == plain.visits(1)[0].tolist()
    among_equals = {tuple(EpochOrder(np.ones(6), seed, length_U).visits(0)[0][:2].tolist()) for seed in range(20)}
    assert among_equals == {(1, 3), (3, 1)}


@pytest.mark.parametrize("recipe, keys", [("sft", ["streaming=true", "max_steps=4"]), ("rl", [])])
def test_a_curriculum_needs_lengths(recipe, keys):
    with pytest.raises(ConfigError, match=r"curriculum length with (streaming true|stage rl)"):
        load_recipe(ROOT / f"recipes/quickstart/{recipe}.yaml", ["curriculum=length", *keys])
