"""Views: noised copies of a document's response blocks, as plain values."""

from dfactory.views.edit import Drafts, EditTargets
from dfactory.views.embedding import MaskEmbeddingNoise
from dfactory.views.mask import GridMask, RandomMask, masked_view, recipe_mask, response_blocks, view_positions
from dfactory.views.trace import TraceViews, block_of_step, every_transition, state_after, state_before, transition_view

__all__ = [
    "Drafts",
    "EditTargets",
    "GridMask",
    "MaskEmbeddingNoise",
    "RandomMask",
    "TraceViews",
    "block_of_step",
    "every_transition",
    "masked_view",
    "recipe_mask",
    "response_blocks",
    "state_after",
    "state_before",
    "transition_view",
    "view_positions",
]
