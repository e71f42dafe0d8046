"""The clipped policy gradient on the decoder's own steps: TraceRL, CJ-GRPO (docs/method.md#policy-gradients).

All of a rollout's steps, each target once: the log-probabilities add up to the likelihood of the trace. Or `trace_steps`
sampled ones a block, weighted so that the sum is unbiased.
"""

from dataclasses import dataclass
from typing import Any, Optional

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.policy_gradient import TokenLevel, TokenLevelKeys
from dfactory.algorithms.rollouts import RolloutViews, mean_of
from dfactory.config.keys import key
from dfactory.noise import RandomMask
from dfactory.noise.trace import TraceViews, every_transition


@dataclass
class TraceKeys(TokenLevelKeys):
    trace_steps: Optional[int] = key(
        None, "sampled steps a block, weighted by 1 / probability; null: all of them", low=1
    )
    importance_cap: Optional[float] = key(
        2.0,
        "each target weighs exp(old log-probability - the decoder's recorded one), at most this; null: 1",
        low=1.0,
    )


class TracePolicyGradient(TokenLevel):
    name = "trace"
    summary = "token ratios on the decoder's own steps"
    source = "docs/method.md#policy-gradients"
    Keys = TraceKeys
    default_of = "policy_loss"
    recorded = True

    def views(self, recipe: Any, random_mask: RandomMask) -> RolloutViews:
        mask_id = random_mask.mask_id
        if recipe.trace_steps is None:
            return all_steps(mask_id)
        sampled = TraceViews(mask_id, recipe.seed, num_views=recipe.trace_steps, stratified=recipe.stratified)
        return lambda document, index: (document, mean_of(sampled(document, index)))

    def importance_cap(self, recipe: Any) -> float | None:
        return recipe.importance_cap


def all_steps(mask_id: int) -> RolloutViews:
    """Views of all of the decoder's steps."""
    return lambda document, index: (document, every_transition(document, 1, mask_id))


ALGORITHMS.add(TracePolicyGradient())
