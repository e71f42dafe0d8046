"""What stands for a rollout's likelihood: its views, by the recipe's `policy_loss` (docs/method.md#policy-gradients).

    trace        the decoder's own steps. All of them, each target once: the log-probabilities add up to the likelihood of
                 the trace. Or `trace_steps` sampled ones a block, weighted so that the sum is unbiased.
    ebpo         the ELBO views of supervised training (num_views, complementary, stratified, ...): their mean.
    diffu_grpo   one view with the whole response masked, the prompt's tokens masked with probability PROMPT_MASK.

Weights come divided by the number of views where the views are samples, so that a sum over targets is the estimate.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from dfactory.noise import RandomMask, masked_view, view_positions
from dfactory.noise.schedules import Purpose, generator
from dfactory.noise.trace import TraceViews, every_transition
from dfactory.recipe import Recipe
from dfactory.types import AlignedDocument, View

PROMPT_MASK = 0.15  # d1; docs/method.md#policy-gradients

RolloutViews = Callable[[AlignedDocument, int], tuple[AlignedDocument, list[View]]]
"""(document of a rollout, its index in the group) -> the document as the clean stream shows it, and its views."""


def rollout_views(recipe: Recipe, random_mask: RandomMask) -> RolloutViews:
    """The views that the recipe asks for; `random_mask` makes those of ebpo."""
    mask_id, seed = random_mask.mask_id, recipe.seed
    if recipe.policy_loss == "ebpo":
        return lambda document, index: (document, _mean_of(random_mask(document, index)))
    if recipe.policy_loss == "diffu_grpo":
        return lambda document, index: _all_masked(document, index, mask_id, seed)
    if recipe.trace_steps is None:
        return lambda document, index: (document, every_transition(document, 1, mask_id))
    sampled = TraceViews(mask_id, seed, num_views=recipe.trace_steps, stratified=recipe.stratified)
    return lambda document, index: (document, _mean_of(sampled(document, index)))


def _mean_of(views: list[View]) -> list[View]:
    return [dataclasses.replace(view, elbo_weight_P=view.elbo_weight_P / len(views)) for view in views]


def _all_masked(document: AlignedDocument, index: int, mask_id: int, seed: int) -> tuple[AlignedDocument, list[View]]:
    rng = generator(seed, document.document_id, index, 0, Purpose.MASK)
    hidden_T = (rng.random(len(document.input_ids_T)) < PROMPT_MASK) & ~document.trainable_T
    ids_T = np.where(hidden_T, np.int32(mask_id), document.input_ids_T).astype(np.int32)
    shown = dataclasses.replace(document, input_ids_T=ids_T)
    position = view_positions(document)
    return shown, [masked_view(shown, position, document.trainable_T[position], np.ones(len(position)), mask_id)]
