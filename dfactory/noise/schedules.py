"""The mask ratios t, the weight of a target at t, and the random numbers of both (docs/method.md#noise).

All noise is counter-based: a pure function of (seed, document, visit, view). Nothing here reads or advances a global
random state, so the noise of a document does not depend on rank, batch, or what ran before.
"""

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """What a stream of random numbers is for. Each has its own, so that the n-th number of one stays the n-th, however
    many another draws: two answers to one prompt get the same masks as far as both reach."""

    RATIO = 0
    MASK = 1
    EDIT = 2  # which visible tokens are replaced, by what, and which are targets as they are
    DRAFT = 3  # which targets carry the model's draft in the next turn
    PLANT = 4  # the error that an evaluation puts into a right answer
    TOKEN = 5  # which tokens uniform noise puts in the place of others
    CONDITION = 6  # which views get the model's prediction of a first pass


def generator(seed: int, document_id: int, visit: int, view: int, purpose: Purpose) -> np.random.Generator:
    """The stream of random numbers that belongs to one view of one document on one visit.

    Philox is keyed by (seed, document); purpose, visit and view are the high words of its counter, which drawing numbers
    never reaches. A visit is the count of times that the run has met the document before: its epoch, at weight 1.
    """
    return np.random.Generator(np.random.Philox(key=[seed, document_id], counter=[0, purpose, visit, view]))


def draw_t(
    rng: np.random.Generator, count: int, low: float, high: float, *, slice_index: int = 0, num_slices: int = 1
) -> np.ndarray:
    """`count` mask ratios, uniform over [low, high], or over one of `num_slices` equal slices of it. float64 [count]."""
    width = (high - low) / num_slices
    return low + width * (slice_index + rng.random(count))


def linear_elbo_weight(t: np.ndarray) -> np.ndarray:
    """-alpha'_t / (1 - alpha_t) on the linear schedule alpha_t = 1 - t, that is 1/t; 0 where t is 0 and masks nothing."""
    return np.divide(1.0, t, out=np.zeros_like(t), where=t > 0)
