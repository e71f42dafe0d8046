"""The clipped policy gradient on ELBOs, one ratio a response: EBPO, ESPO (docs/method.md#policy-gradients)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.policy_gradient import ClippedKeys, ClippedPolicyGradient
from dfactory.algorithms.rollouts import RolloutViews, mean_of
from dfactory.config.keys import key
from dfactory.noise import RandomMask

WIDE_CLIP = 0.5  # 0.02 nat of drift a token make a standard deviation of 0.3 in a sum over 256 tokens


@dataclass
class EBPOKeys(ClippedKeys):
    ratio_normalisation: str = key(
        "mean",
        "the log-ratio of a response is a sum, divided by its tokens, or divided by its blocks; "
        "epsilon has to be meant for it",
        choices=("sum", "mean", "block"),
    )


class ELBOPolicyGradient(ClippedPolicyGradient):
    name = "ebpo"
    summary = "one ratio a response, from the ELBO views of supervised training"
    source = "docs/method.md#policy-gradients"
    Keys = EBPOKeys

    def unit(self, recipe: Any) -> dict[str, Any]:
        return {"level": "sequence", "normaliser": recipe.ratio_normalisation}

    def views(self, recipe: Any, random_mask: RandomMask) -> RolloutViews:
        return lambda document, index: (document, mean_of(random_mask(document, index)))

    def dividing_key(self, recipe: Any) -> str | None:
        return self.selector

    def warnings(self, recipe: Any) -> Iterator[str]:
        if recipe.ratio_normalisation == "sum" and recipe.epsilon < WIDE_CLIP:
            yield (
                f"epsilon {recipe.epsilon:g} with ratio_normalisation sum: the ratio of a whole response leaves that range "
                "by noise alone; use ratio_normalisation mean, or a range that is meant for sums"
            )
        if recipe.kl_coef > 0 and recipe.kl_estimator == "k3":
            yield f"kl_estimator k3 with {self.selector} explodes on ELBO differences: use k2"


ALGORITHMS.add(ELBOPolicyGradient())
