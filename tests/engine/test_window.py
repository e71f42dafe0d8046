"""The only division: any cut of the same targets into ranks and micro-batches gives the same loss and gradient."""

from types import SimpleNamespace

import pytest
import torch

from dfactory.engine.window import MeanTracker, mean_over_levels, means_by_t, micro_loss, window_counts
from dfactory.types import LossTerms, Mean, Objective, TokenScores

NLL = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


class Targets(list):
    """Stands for a ViewBatch: a list of target numbers is all that the objective below looks at."""


class SumOfNll(Objective):
    def counts(self, batch, scores=None):
        return {"nll": float(len(batch))}

    def __call__(self, batch, weight):
        return LossTerms({"nll": Mean(sum((weight * NLL[i] for i in batch), weight * 0), len(batch))}, {})


# ranks x micro-batches, unevenly filled, one of them empty
CUTS = [
    [[[0, 1, 2, 3, 4, 5]]],
    [[[0], [1, 2, 3], [4, 5]]],
    [[[0, 1, 2, 3, 4]], [[5]]],
    [[[0, 1], [2]], [[3, 4, 5], []]],
]


@pytest.mark.parametrize("ranks", CUTS)
def test_any_cut_gives_the_same_gradient(ranks):
    objective, world = SumOfNll(), len(ranks)
    windows = [[Targets(batch) for batch in rank] for rank in ranks]
    shares = [sum(objective.counts(batch)["nll"] for batch in window) for window in windows]
    weight = torch.tensor(2.0, requires_grad=True)
    gradient = 0.0
    for window in windows:
        counts = window_counts(
            objective, window, [None] * len(window), all_reduce=lambda total: total.fill_(sum(shares))
        )
        assert counts == {"nll": 6.0}
        for batch in window:
            loss = micro_loss(objective(batch, weight), counts, world)
            gradient += torch.autograd.grad(loss, weight)[0].item() / world  # what DeepSpeed's average over ranks does
    assert gradient == pytest.approx(sum(NLL) / 6)


def test_a_window_without_targets_does_not_divide_by_zero():
    objective = SumOfNll()
    counts = window_counts(objective, [Targets()], [None], all_reduce=lambda total: None)
    assert micro_loss(objective(Targets(), torch.tensor(1.0)), counts, 1).item() == 0.0


def test_means_are_divided_after_they_are_summed():
    tracker = MeanTracker()
    tracker.add({"a": Mean(torch.tensor(6.0), 2), "never": Mean(torch.tensor(0.0), 0)})
    tracker.add({"a": Mean(torch.tensor(2.0), 6), "never": Mean(torch.tensor(0.0), 0)})

    def two_equal_ranks(table):
        table.mul_(2)

    assert tracker.reduce(two_equal_ranks) == {"a": 1.0}


def test_means_by_t():
    """At t = 0.1 one target, at 0.3 two real ones and one of fill, at 0.9 none. A mean over levels counts each the same."""
    hits = torch.tensor([True, False, True, True])
    logprob = torch.tensor([-1.0, -3.0, -5.0, -0.4])
    scores = TokenScores(logprob, torch.zeros(4), hits, torch.zeros(4, dtype=torch.long), logprob)
    batch = SimpleNamespace(t_N=torch.tensor([0.1, 0.3, 0.3, 0.3]), real_N=torch.tensor([True, True, True, False]))
    means = means_by_t([0.1, 0.3, 0.9])(batch, scores)
    assert {name: (mean.total.item(), int(mean.count)) for name, mean in means.items()} == {
        "loss_t0.10": (1.0, 1),
        "token_nll_t0.10": (1.0, 1),
        "hit_rate_t0.10": (1, 1),
        "loss_t0.30": (pytest.approx(8.4), 3),
        "token_nll_t0.30": (8.0, 2),
        "hit_rate_t0.30": (1, 2),
        "loss_t0.90": (0.0, 0),
        "token_nll_t0.90": (0.0, 0),
        "hit_rate_t0.90": (0, 0),
    }
    tracker = MeanTracker()
    tracker.add(means)
    told = mean_over_levels(tracker.reduce(lambda table: None) | {"entropy_total": 7.0})
    assert {name: value for name, value in told.items() if not name[-1].isdigit()} == {
        "loss": pytest.approx((1.0 + 2.8) / 2),
        "token_nll": pytest.approx((1.0 + 4.0) / 2),
        "hit_rate": pytest.approx((1 + 0.5) / 2),
        "entropy_total": 7.0,
    }
