"""Views: noised copies of a document's response blocks, as plain values."""

from dfactory.views.edit import Drafts, EditTargets
from dfactory.views.mask import GridMask, RandomMask, masked_view, view_positions
from dfactory.views.trace import block_of_step, state_after, state_before

__all__ = [
    "Drafts",
    "EditTargets",
    "GridMask",
    "RandomMask",
    "block_of_step",
    "masked_view",
    "state_after",
    "state_before",
    "view_positions",
]
