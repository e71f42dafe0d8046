"""Random-mask views: independent, stratified, and in complementary pairs (METHOD section 3, [L20] 5.1).

A view holds the blocks of the document that hold a response token, and nothing else. Only response tokens are masked;
those that are masked are the targets. The twin of a view masks exactly the other response tokens, so that over the pair
every one of them is a target once.
"""

import dataclasses

import numpy as np

from dfactory.types import AlignedDocument, View
from dfactory.views.schedules import Purpose, draw_t, generator, linear_elbo_weight


def view_positions(document: AlignedDocument) -> np.ndarray:
    """Positions of the blocks that hold a response token, ascending."""
    blocks = document.trainable_T.reshape(-1, document.block_size).any(axis=1)
    return np.flatnonzero(np.repeat(blocks, document.block_size)).astype(np.int32)


def masked_view(
    document: AlignedDocument, position_P: np.ndarray, masked_P: np.ndarray, t_P: np.ndarray, mask_id: int
) -> View:
    """The view that masks exactly the positions of `masked_P`. Build views of one's own with this."""
    ids = document.input_ids_T[position_P]
    return View(
        position_P=position_P,
        input_ids_P=np.where(masked_P, np.int32(mask_id), ids).astype(np.int32),
        target_P=masked_P,
        t_P=t_P.astype(np.float32),
        elbo_weight_P=linear_elbo_weight(t_P).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True)
class RandomMask:
    """Makes the training views of a document; see config/noise.py for the meaning of the options."""

    mask_id: int
    seed: int
    low: float
    high: float
    per_block: bool = True
    num_views: int = 1
    complementary: bool = False
    stratified: bool = False

    def __call__(self, document: AlignedDocument, visit: int) -> list[View]:
        """num_views views, or twice as many with `complementary`: view, its twin, view, ..."""
        position = view_positions(document)
        response = document.trainable_T[position]
        views = []
        for number in range(self.num_views):
            t = self._draw_t(document, visit, number, len(position) // document.block_size)
            rng = generator(self.seed, document.document_id, visit, number, Purpose.MASK)
            masked = response & (rng.random(len(position)) < t)
            views.append(masked_view(document, position, masked, t, self.mask_id))
            if self.complementary:
                views.append(masked_view(document, position, response & ~masked, 1.0 - t, self.mask_id))
        return views

    def _draw_t(self, document: AlignedDocument, visit: int, number: int, num_blocks: int) -> np.ndarray:
        rng = generator(self.seed, document.document_id, visit, number, Purpose.RATIO)
        slices = {"slice_index": number, "num_slices": self.num_views} if self.stratified else {}
        draws = draw_t(rng, num_blocks if self.per_block else 1, self.low, self.high, **slices)
        return np.repeat(np.resize(draws, num_blocks), document.block_size)


@dataclasses.dataclass(frozen=True)
class GridMask:
    """Makes the evaluation views of a document: one at each of a fixed list of mask ratios, the same on every visit."""

    mask_id: int
    seed: int
    levels: tuple[float, ...]

    def __call__(self, document: AlignedDocument, visit: int) -> list[View]:
        position = view_positions(document)
        response = document.trainable_T[position]
        views = []
        for number, level in enumerate(self.levels):
            rng = generator(self.seed, document.document_id, 0, number, Purpose.MASK)
            masked = response & (rng.random(len(position)) < level)
            views.append(masked_view(document, position, masked, np.full(len(position), level), self.mask_id))
        return views
