"""diffu-GRPO of d1: token ratios on one view with the whole response masked (docs/method.md#policy-gradients)."""

from typing import Any

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.one_step import all_masked
from dfactory.algorithms.policy_gradient import TokenLevel
from dfactory.algorithms.rollouts import RolloutViews
from dfactory.noise import RandomMask


class OneStepPolicyGradient(TokenLevel):
    name = "diffu_grpo"
    summary = "token ratios on one view with the whole response masked"
    source = "docs/method.md#policy-gradients"

    def views(self, recipe: Any, random_mask: RandomMask) -> RolloutViews:
        return all_masked(random_mask.mask_id, recipe.seed)


ALGORITHMS.add(OneStepPolicyGradient())
