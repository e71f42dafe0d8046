"""Threads of the processes that hold a model: who computes at the same time shares the cores."""

import pytest

from dfactory.recipe import read_recipe
from dfactory.rl.cluster import Threads
from tests.engine.conftest import ROOT

RECIPE = ROOT / "recipes/quickstart/rl.yaml"


@pytest.mark.parametrize(
    "keys, cores, given, threads",
    [
        ((), 2, None, (2, 2)),  # in turns
        (("num_rollout_workers=4",), 8, None, (8, 2)),
        (("num_rollout_workers=4",), 2, None, (2, 1)),
        (("max_staleness=1",), 2, None, (1, 1)),  # groups are decoded ahead
        (("max_staleness=1", "num_rollout_workers=3"), 16, None, (4, 4)),
        (("max_staleness=1", "num_iterations=2"), 2, None, (2, 2)),
        ((), 8, "3", (3, 3)),
    ],
)
def test_threads(keys, cores, given, threads):
    assert Threads.of(read_recipe(RECIPE, [*keys]).recipe, cores, given) == threads
