"""The clipped policy gradient on the decoder's own steps: TraceRL, CJ-GRPO (docs/method.md#policy-gradients).

All of a rollout's steps, each target once: the log-probabilities add up to the likelihood of the trace. Or `trace_steps`
sampled ones a block, weighted so that the sum is unbiased. `trace_stride` takes neighbouring steps as one: fewer views, each
target scored from what was known before its group (d2, arXiv:2509.21474).
"""

from collections.abc import Iterator
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
        mask_id, stride = random_mask.mask_id, recipe.trace_stride
        if recipe.trace_steps is None:
            return all_steps(mask_id, stride)
        sampled = TraceViews(mask_id, recipe.seed, stride, num_views=recipe.trace_steps, stratified=recipe.stratified)
        return lambda document, index: (document, mean_of(sampled(document, index)))

    def is_recorded(self, recipe: Any) -> bool:
        return recipe.trace_stride == 1

    def importance_cap(self, recipe: Any) -> float | None:
        return recipe.importance_cap if self.is_recorded(recipe) else None

    def problems(self, recipe: Any) -> Iterator[str]:
        if not self.is_recorded(recipe) and recipe.decode.temperature not in (0, 1):
            yield (
                f"decode.temperature {recipe.decode.temperature:g} with {self.selector} and trace_stride "
                f"{recipe.trace_stride}: the decoder has recorded single steps, so no weight corrects its distribution; set "
                "one of them to 1"
            )
        yield from super().problems(recipe)

    def warnings(self, recipe: Any) -> Iterator[str]:
        yield from super().warnings(recipe)
        if recipe.block_size is None and recipe.trace_steps is None and recipe.trace_stride == 1:
            yield (
                f"{self.selector} with block_size null: each forward of a rollout is a view of its whole canvas, up to "
                f"{recipe.decode.max_new_tokens} views; trace_steps or trace_stride bounds their number"
            )

    def notes(self, recipe: Any) -> list[str]:
        merged = f"{recipe.trace_stride} steps as one, which the decoder has no record of: no importance weights"
        return [*super().notes(recipe), *([] if self.is_recorded(recipe) else [merged])]


def all_steps(mask_id: int, stride: int = 1) -> RolloutViews:
    """Views of all of the decoder's steps, `stride` neighbouring ones as one."""
    return lambda document, index: (document, every_transition(document, stride, mask_id))


ALGORITHMS.add(TracePolicyGradient())
