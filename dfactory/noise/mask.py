"""Random-mask views: independent, stratified, and in complementary pairs (docs/method.md#noise).

A view holds the blocks of the document that hold a response token, and nothing else. Only response tokens are masked;
those that are masked are the targets. The twin of a view masks exactly the other response tokens, so that over the pair
every one of them is a target once.

`bernoulli` masks each token with probability t and weighs it 1/t. `exact` draws the number l of masks of n response tokens
uniformly from 0 to n and weighs each of them (n + 1) / l. The sets S come out as with t uniform on [0, 1], where too
P(|S| = l) = 1 / (n + 1), and the weight is E[1/t | S], t being Beta(l + 1, n - l + 1) then: the same expectation with less
variance, and none of the blow-up at small t.
"""

import dataclasses

import numpy as np

from dfactory.noise.schedules import Purpose, draw_t, generator, linear_elbo_weight
from dfactory.types import AlignedDocument, View


def view_positions(document: AlignedDocument) -> np.ndarray:
    """Positions of the blocks that hold a response token, ascending."""
    blocks = document.trainable_T.reshape(-1, document.block_size).any(axis=1)
    return np.flatnonzero(np.repeat(blocks, document.block_size)).astype(np.int32)


def response_blocks(document: AlignedDocument) -> int:
    """How many blocks hold a response token."""
    return int(document.trainable_T.reshape(-1, document.block_size).any(axis=1).sum())


def masked_view(
    document: AlignedDocument,
    position_P: np.ndarray,
    masked_P: np.ndarray,
    t_P: np.ndarray,
    mask_id: int,
    weight_scale_P: np.ndarray | float = 1.0,
) -> View:
    """The view that masks exactly the positions of `masked_P`. Build views of one's own with this.

    `weight_scale_P` multiplies the weight 1/t where the estimator differs from the plain one.
    """
    ids = document.view_ids_T[position_P]
    return View(
        position_P=position_P,
        input_ids_P=np.where(masked_P, np.int32(mask_id), ids).astype(np.int32),
        target_P=masked_P,
        t_P=t_P.astype(np.float32),
        elbo_weight_P=(linear_elbo_weight(t_P) * weight_scale_P).astype(np.float32),
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
    mask_count: str = "bernoulli"

    def __call__(self, document: AlignedDocument, visit: int) -> list[View]:
        """num_views views, or twice as many with `complementary`: view, its twin, view, ..."""
        position = view_positions(document)
        response = document.trainable_T[position]
        draw = self._draw_exact if self.mask_count == "exact" else self._draw_bernoulli
        views = []
        for number in range(self.num_views):
            masked, t, scale = draw(document, response, visit, number)
            views.append(masked_view(document, position, masked, t, self.mask_id, scale))
            if self.complementary:
                views.append(masked_view(document, position, response & ~masked, 1.0 - t, self.mask_id, scale))
        return views

    def _draw_bernoulli(self, document: AlignedDocument, response_P: np.ndarray, visit: int, number: int):
        """-> masked_P, t_P, and 1: the weight is 1/t."""
        t_US = self._draw_t(document, response_P, visit, number, self.low, self.high)
        noise_P = generator(self.seed, document.document_id, visit, number, Purpose.MASK).random(len(response_P))
        return response_P & (noise_P < t_US.ravel()), t_US.ravel(), 1.0

    def _draw_exact(self, document: AlignedDocument, response_P: np.ndarray, visit: int, number: int):
        """-> masked_P, t_P = l / n, and (n + 1) / n: the weight is (n + 1) / l. Units U are blocks, or the document.

        Of a pair the view has the fewer masks: it does not matter which half has them, and slices of [0, 1] would meet
        their own twins.
        """
        share_US = self._draw_t(document, response_P, visit, number, 0.0, 0.5 if self.complementary else 1.0)
        noise_P = generator(self.seed, document.document_id, visit, number, Purpose.MASK).random(len(response_P))
        n_US = np.broadcast_to(response_P.reshape(share_US.shape).sum(axis=1, keepdims=True), share_US.shape)
        masks_US = np.floor(share_US * (n_US + 1))
        order_US = np.where(response_P, noise_P, np.inf).reshape(share_US.shape).argsort(axis=1)
        masked_US = order_US.argsort(axis=1) < masks_US
        return masked_US.ravel(), (masks_US / n_US).ravel(), ((n_US + 1) / n_US).ravel()

    def _draw_t(
        self, document: AlignedDocument, response_P: np.ndarray, visit: int, number: int, low: float, high: float
    ) -> np.ndarray:
        """A number for each unit (block, or the whole view), repeated over its positions: float64 [U, S]."""
        size = document.block_size if self.per_block else len(response_P)
        units = len(response_P) // size if size else 0
        rng = generator(self.seed, document.document_id, visit, number, Purpose.RATIO)
        slices = {"slice_index": number, "num_slices": self.num_views} if self.stratified else {}
        return np.repeat(draw_t(rng, units, low, high, **slices)[:, None], size, axis=1)


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
