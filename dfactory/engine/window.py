"""The only division: from sums over micro-batches and ranks to the loss of a global batch.

With S_ra the sum of rank r and micro-batch a, and Z_ra its count, the loss of the global batch is

    L = sum_ra S_ra / Z,    Z = sum_ra Z_ra

so Z is summed over all micro-batches and ranks before the first backward, and each micro-batch contributes S_ra / Z.
Several loss terms, each with its own S and Z, add up with their weights. L and its gradient do not depend on how the
documents are split into ranks and micro-batches. DeepSpeed averages gradients over ranks, which would divide once more:
`micro_loss` multiplies by the number of ranks.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Protocol

import torch

from dfactory.models.head import makes_gradients_ahead
from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


class Source(Protocol):
    """Where global batches come from. A source may wrap another one and add columns that a model computes."""

    def next_window(self) -> list[ViewBatch] | None:
        """This rank's micro-batches of the next global batch, the same number on every rank; None at the end of the run."""

    @property
    def epoch(self) -> float: ...

    @property
    def metrics(self) -> dict[str, float]:
        """The source's own metrics of its last global batch; logged with the loss."""

    def check(self, metrics: dict[str, float]) -> None:
        """Raise an error if the metrics of the last global batch contradict what the source knows about it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MappedSource(Source):
    """Another source whose micro-batches are changed by a function. It has no state of its own."""

    def __init__(self, source: Source, change: Callable[[ViewBatch], ViewBatch]):
        self.source, self.change = source, change

    def next_window(self) -> list[ViewBatch] | None:
        window = self.source.next_window()
        return None if window is None else [self.change(batch) for batch in window]

    @property
    def epoch(self) -> float:
        return self.source.epoch

    @property
    def metrics(self) -> dict[str, float]:
        return self.source.metrics

    def check(self, metrics: dict[str, float]) -> None:
        self.source.check(metrics)

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)


Measure = Callable[[ViewBatch, TokenScores], dict[str, Mean]]
"""What an evaluation measures on a micro-batch."""

LEVEL = re.compile(r"(.+)_t\d\.\d\d")  # the name of a metric at one mask ratio


def window_counts(
    objective: Objective, micro_batches: list[ViewBatch], scores: list[TokenScores | None], all_reduce
) -> dict[str, float]:
    """Z of every loss term. `all_reduce` sums a float64 tensor over the ranks in place.

    A count of 0 becomes 1; any other count, also one below 1, is used as it is. An infinite count becomes NaN, because a
    loss divided by it would look like a finite 0.
    """
    shares = [objective.counts(batch, ahead) for batch, ahead in zip(micro_batches, scores, strict=True)]
    names = sorted(shares[0])
    total = torch.tensor([float(sum(share[name] for share in shares)) for name in names], dtype=torch.float64)
    all_reduce(total)
    finite = (value if math.isfinite(value) else math.nan for value in total.tolist())
    return {name: value or 1.0 for name, value in zip(names, finite, strict=True)}


def micro_loss(terms: LossTerms, counts: dict[str, float], world_size: int) -> torch.Tensor:
    """The loss to backpropagate for one micro-batch. Averaged over ranks it gives the global batch's gradient."""
    parts = (terms.weights.get(name, 1.0) * mean.total / counts[name] for name, mean in terms.loss.items())
    return sum(parts) * world_size


def spread_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, with a NaN gradient if the loss is NaN or infinite; a finite loss keeps every bit.

    A loss of +inf can have a finite gradient. With this the norm of the gradient, which all ranks learn before weights
    change, shows either case, and the host need not read the loss from the device in the middle of a step.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def with_gradient(batch: ViewBatch, objective: Objective, counts: dict[str, float], world_size: int) -> ViewBatch:
    """The batch with the column `gradient_N` where the objective is linear in its log-probabilities. What the backward will
    bring is equal to the bit, because the same operations make it from other log-probabilities."""
    device = batch.target_ids_N.device
    if not makes_gradients_ahead(device) or not objective.is_linear(batch) or not batch.num_targets:
        return batch
    zero_N = torch.zeros(batch.num_targets, device=device)
    leaf_N = zero_N.clone().requires_grad_()
    terms = objective(batch, TokenScores(leaf_N, zero_N, zero_N > 0, torch.zeros_like(batch.target_ids_N), zero_N))
    loss = spread_nonfinite(micro_loss(terms, counts, world_size))
    return batch.with_columns(gradient_N=torch.autograd.grad(loss, leaf_N)[0])


class MeanTracker:
    """Adds up means over micro-batches without leaving the device, then over ranks, then divides."""

    def __init__(self):
        self.totals: dict[str, torch.Tensor] = {}
        self.counts: dict[str, Count] = {}

    def add(self, means: dict[str, Mean]) -> None:
        for name, mean in means.items():
            self.totals[name] = self.totals.get(name, 0.0) + torch.as_tensor(mean.total).detach().double()
            count = mean.count.detach().double() if isinstance(mean.count, torch.Tensor) else mean.count
            self.counts[name] = self.counts.get(name, 0.0) + count

    def reduce(self, all_reduce) -> dict[str, float]:
        """Sum over the ranks, then total / count by name. Every rank must have the same names; a name with a count of 0
        is left out."""
        names = sorted(self.totals)
        totals = torch.stack([self.totals[name].cpu() for name in names])
        counts = torch.tensor([float(self.counts[name]) for name in names], dtype=torch.float64)
        table = torch.stack([totals, counts])
        all_reduce(table)
        return {n: total / count for n, total, count in zip(names, *table.tolist(), strict=True) if count > 0}


def means_by_t(levels: list[float]) -> Measure:
    """A measure by mask ratio: for each of `levels` the loss of the targets, and the negative log-likelihood and accuracy
    of the real ones (without the fill). `mean_over_levels` averages them over the levels."""

    def measure(batch: ViewBatch, scores: TokenScores) -> dict[str, Mean]:
        nll_N, means = -scores.logprob_N, {}
        for level in levels:
            here_N = (batch.t_N - level).abs() < 1e-4
            real_N = here_N & batch.real_N
            means[f"loss_t{level:.2f}"] = Mean(nll_N[here_N].sum(), here_N.sum())
            means[f"token_nll_t{level:.2f}"] = Mean(nll_N[real_N].sum(), real_N.sum())
            means[f"hit_rate_t{level:.2f}"] = Mean(scores.hit_N[real_N].sum(), real_N.sum())
        return means

    return measure


def mean_over_levels(means: dict[str, float]) -> dict[str, float]:
    """The same numbers, and for each metric by mask ratio (`loss_t0.30`) its mean over the ratios (`loss`). Every ratio
    counts the same, although a view at a high ratio has more targets."""
    by_name: dict[str, list[float]] = {}
    for name, value in means.items():
        if level := LEVEL.fullmatch(name):
            by_name.setdefault(level[1], []).append(value)
    return means | {name: sum(values) / len(values) for name, values in by_name.items()}
