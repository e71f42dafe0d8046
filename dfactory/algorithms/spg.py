"""Sandwiched policy gradient: likelihoods bounded on the side that the advantage pushes them to (docs/method.md#spg).

    L = - sum over rollouts o of  A_o l(o) / (real tokens of o)  /  rollouts

    l = ELBO                            where A_o >= 0: raising a lower bound raises the likelihood
    l = w EUBO + (1 - w) ELBO           where A_o < 0: lowering an upper bound lowers it

    EUBO = 1/b sum over positions i of  log E_t[ p_i^b 1{i masked} / t ],    b >= 1

There is no ratio, so rollouts must be fresh: stale ones are not corrected. The expectation of a position is its mean over
the rollout's views; one that no view masked has no term. The paper does not fix the division by a rollout's tokens, which
keeps long answers from outweighing short ones here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.metrics import token_metrics
from dfactory.algorithms.rollouts import RolloutAlgorithm, RolloutKeys, RolloutViews, mean_of
from dfactory.algorithms.units import by_unit, sum_by_unit, units
from dfactory.config.keys import key
from dfactory.noise import RandomMask
from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class SandwichedPolicyGradient(Objective):
    eubo_weight: float = 0.5
    eubo_power: float = 1.5
    spans_micro_batches = True  # a position's expectation joins all views of a rollout

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, Count]:
        return {"policy": batch.columns["share_D"].sum()}

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        elbo_U = sum_by_unit(batch, batch.elbo_weight_N * scores.logprob_N)
        eubo_U = self.eubo(batch, scores.logprob_N)
        advantage_U, length_U = by_unit(batch, batch.columns["advantage_D"]), by_unit(batch, batch.answer_length_D)
        mixed_U = self.eubo_weight * eubo_U + (1 - self.eubo_weight) * elbo_U
        likelihood_U = torch.where(advantage_U >= 0, elbo_U, mixed_U) / length_U
        metrics = token_metrics(batch, scores)
        metrics["bound_gap"] = Mean((eubo_U - elbo_U).detach().sum(), length_U.sum())
        return LossTerms({"policy": Mean(-(advantage_U * likelihood_U).sum(), self.counts(batch)["policy"])}, metrics)

    def eubo(self, batch: ViewBatch, logprob_N: torch.Tensor) -> torch.Tensor:
        """The upper bound of each rollout in nats, float32 [U]. P counts pairs of a rollout and a position of it."""
        rollout_U, unit_N = units(batch)
        position_N = batch.position_ids_RS.flatten()[batch.target_index_N]
        place_P, place_N = (unit_N * batch.position_ids_RS.max().add(1) + position_N).unique(return_inverse=True)
        term_N = self.eubo_power * logprob_N + batch.elbo_weight_N.log()
        top_P = term_N.new_full((len(place_P),), -torch.inf).scatter_reduce(0, place_N, term_N.detach(), "amax")
        sum_P = torch.zeros_like(top_P).index_add(0, place_N, (term_N - top_P[place_N]).exp())
        unit_P = torch.zeros_like(place_P).index_copy(0, place_N, unit_N)
        log_P = (top_P + sum_P.log()) / self.eubo_power
        return torch.zeros(len(rollout_U), device=log_P.device).index_add(0, unit_P, log_P)


@dataclasses.dataclass
class SPGKeys(RolloutKeys):
    eubo_weight: float = key(
        0.5, "w: share of the upper bound in the likelihood of a rollout with a negative advantage", low=0.0, high=1.0
    )
    eubo_power: float = key(1.5, "b: power of the probabilities in the upper bound", low=1.0)


class SPG(RolloutAlgorithm):
    name = "spg"
    summary = "no ratio: ELBOs for good rollouts, a mixture with an upper bound for bad ones"
    source = "docs/method.md#spg"
    Keys = SPGKeys

    def views(self, recipe: Any, random_mask: RandomMask) -> RolloutViews:
        return lambda document, index: (document, mean_of(random_mask(document, index)))

    def dividing_key(self, recipe: Any) -> str | None:
        return self.selector

    def warnings(self, recipe: Any) -> Iterator[str]:
        if recipe.max_staleness > 0:
            yield f"max_staleness {recipe.max_staleness} with {self.selector}: nothing corrects stale rollouts; set it to 0"

    def objective(self, recipe: Any, editing_mask_id: int | None) -> SandwichedPolicyGradient:
        return SandwichedPolicyGradient(recipe.eubo_weight, recipe.eubo_power)


ALGORITHMS.add(SPG())
