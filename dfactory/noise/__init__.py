"""Views: noised copies of a document's response blocks, as plain values."""

from dfactory.noise.edit import Drafts, EditTargets
from dfactory.noise.embedding import MaskEmbeddingNoise, TokenEmbeddingNoise
from dfactory.noise.mask import GridMask, RandomMask, masked_view, response_blocks, view_positions
from dfactory.noise.trace import TraceViews, block_of_step, every_transition, state_after, state_before, transition_view
from dfactory.noise.uniform import GridUniform, UniformNoise

__all__ = [
    "Drafts",
    "EditTargets",
    "GridMask",
    "GridUniform",
    "MaskEmbeddingNoise",
    "RandomMask",
    "TokenEmbeddingNoise",
    "TraceViews",
    "UniformNoise",
    "block_of_step",
    "every_transition",
    "masked_view",
    "response_blocks",
    "state_after",
    "state_before",
    "transition_view",
    "view_positions",
]
