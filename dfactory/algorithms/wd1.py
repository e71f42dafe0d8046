"""wd1: a weighted likelihood in place of a ratio (docs/method.md#wd1).

    L = - sum over prompts of  sum over its rollouts o of  (w+_o - w-_o) l(o)  /  prompts

    w+ = softmax(psi A),   w- = softmax(-psi A)       over the scored rollouts of the prompt

`l` is the one-step log-likelihood: one view with the whole response masked, as in diffu-GRPO, here divided by the real
tokens of the rollout. Weights are constants, so several steps on the same rollouts (`num_iterations`) need no old policy.
"""

import dataclasses
from typing import Any

import numpy as np

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.metrics import token_metrics
from dfactory.algorithms.one_step import all_masked
from dfactory.algorithms.rollouts import RolloutAlgorithm, RolloutKeys, RolloutViews
from dfactory.config.keys import key
from dfactory.noise import RandomMask
from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class WeightedLikelihood(Objective):
    """Each rollout's weight is in `advantage_D`, times the rollouts of its prompt, so that their mean is the sum."""

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, Count]:
        return {"policy": batch.columns["share_D"].sum()}

    def is_linear(self, batch: ViewBatch) -> bool:
        return True

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        weight_D = batch.columns["advantage_D"] / batch.answer_length_D
        total = -(weight_D * batch.sum_by_document(scores.logprob_N)).sum()
        return LossTerms({"policy": Mean(total, self.counts(batch)["policy"])}, token_metrics(batch, scores))


@dataclasses.dataclass
class WD1Keys(RolloutKeys):
    psi: float = key(1.0, "how sharply the weights of a group follow its advantages", low=0.0)


class WD1(RolloutAlgorithm):
    name = "wd1"
    summary = "no ratio: one-step likelihoods, weighted by softmaxes of the group's advantages"
    source = "docs/method.md#wd1"
    Keys = WD1Keys

    def views(self, recipe: Any, random_mask: RandomMask) -> RolloutViews:
        return all_masked(random_mask.mask_id, recipe.seed)

    def weights(self, recipe: Any, advantage_G: np.ndarray) -> np.ndarray:
        plus_G, minus_G = _softmax(recipe.psi * advantage_G), _softmax(-recipe.psi * advantage_G)
        return len(advantage_G) * (plus_G - minus_G)

    def objective(self, recipe: Any, editing_mask_id: int | None) -> WeightedLikelihood:
        return WeightedLikelihood()


def _softmax(value_G: np.ndarray) -> np.ndarray:
    weight_G = np.exp(value_G - value_G.max())
    return weight_G / weight_G.sum()


ALGORITHMS.add(WD1())
