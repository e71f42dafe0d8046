"""Views: noised copies of a document's response blocks, as plain values."""

from dfactory.views.mask import GridMask, RandomMask, masked_view, view_positions

__all__ = ["GridMask", "RandomMask", "masked_view", "view_positions"]
