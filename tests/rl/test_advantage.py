"""Advantages of four rollouts, worked by hand."""

import numpy as np
import pytest

from dfactory.rl.advantage import MIN_STD, group_advantages

REWARDS = [1.0, 0.0, 0.0, 3.0]  # mean 1, squared differences 0 1 1 4, variance 6/3
STD = 2**0.5


@pytest.mark.parametrize(
    "baseline, scale, expected",
    [
        ("mean", "none", [0, -1, -1, 2]),
        ("mean", "group", [0, -1 / STD, -1 / STD, 2 / STD]),
        ("leave_one_out", "none", [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3]),
        ("leave_one_out", "group", [0, -4 / 3 / STD, -4 / 3 / STD, 8 / 3 / STD]),
    ],
)
def test_four_rollouts(baseline, scale, expected):
    found = group_advantages(REWARDS, baseline=baseline, scale=scale)
    np.testing.assert_allclose(found.advantage_G, expected, atol=1e-12)
    assert found.weight_G.tolist() == [1, 1, 1, 1]
    assert found.has_signal


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_rollouts_without_a_reward_take_no_part(baseline, scale):
    with_gap = group_advantages([1.0, None, 0.0, 0.0, None, 3.0], baseline=baseline, scale=scale)
    without = group_advantages(REWARDS, baseline=baseline, scale=scale)
    np.testing.assert_array_equal(with_gap.advantage_G[[0, 2, 3, 5]], without.advantage_G)
    assert with_gap.advantage_G[[1, 4]].tolist() == [0, 0]
    assert with_gap.weight_G.tolist() == [1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    "rewards", [[0.7] * 4, [None, 1.0, None, None], [None] * 4, [0.1 + 0.2, 0.3, 0.3, 0.3], [0.0, 0.0, None, 0.0]]
)
def test_groups_without_signal(rewards):
    found = group_advantages(rewards)
    assert not found.has_signal
    assert found.advantage_G.tolist() == [0, 0, 0, 0]


def test_the_deviation_is_clamped():
    found = group_advantages([0.0, 0.0, 0.0, 2e-5])
    np.testing.assert_allclose(found.advantage_G[3], 1.5e-5 / MIN_STD)


def test_advantages_sum_to_zero_and_do_not_depend_on_order():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=8)
    for baseline in ("mean", "leave_one_out"):
        found = group_advantages(rewards.tolist(), baseline=baseline).advantage_G
        assert abs(found.sum()) < 1e-12
        order = rng.permutation(8)
        shuffled = group_advantages(rewards[order].tolist(), baseline=baseline).advantage_G
        np.testing.assert_allclose(shuffled, found[order], atol=1e-12)


def test_what_is_not_a_reward_is_refused():
    with pytest.raises(ValueError, match="not all finite"):
        group_advantages([1.0, float("nan")])
    with pytest.raises(ValueError, match="'median'"):
        group_advantages([1.0, 0.0], baseline="median")


def test_an_algorithm_weighs_the_scored_rollouts_alone():
    found = group_advantages([1.0, None, 0.0], scale="none").weighted(lambda advantage_G: 10 * advantage_G + 1)
    assert found.advantage_G.tolist() == [6.0, 0.0, -4.0]
    without_signal = group_advantages([1.0, 1.0])
    assert without_signal.weighted(lambda advantage_G: advantage_G + 1) is without_signal
