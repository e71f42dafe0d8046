"""Which records an epoch visits, in which order: a pure function of weights, seed and epoch."""

from collections.abc import Sequence

import numpy as np

ORDER, DRAW = 0, 1  # what a random stream of an epoch is for


def tempered(weights: Sequence[float], counts: Sequence[int], temperature: float) -> list[float]:
    """Weights of files whose shares of an epoch are those of `weights` to the power of 1 / temperature. An epoch is as long
    as before. Files without records keep their weight.

    >>> tempered([1.0, 1.0], [900, 100], temperature=2.0)  # shares 0.9 and 0.1 become 3/4 and 1/4
    [0.8333333333333334, 2.5]
    """
    if temperature == 1:
        return list(weights)
    sizes = [weight * count for weight, count in zip(weights, counts, strict=True)]
    powers = [(size / sum(sizes)) ** (1 / temperature) if size else 0.0 for size in sizes]
    return [
        power / sum(powers) * sum(sizes) / count if count else weight
        for weight, count, power in zip(weights, counts, powers, strict=True)
    ]


class EpochOrder:
    """Which units (documents, or pairs) an epoch visits, in which order: a pure function of (weights, seed, epoch), and with
    `length_U` in the first epoch from short to long, in random order among equals."""

    def __init__(self, weight_U: np.ndarray, seed: int, length_U: np.ndarray | None = None):
        self._length_U = length_U
        self._floor_U = np.floor(weight_U).astype(np.int64)
        self._fraction_U = weight_U - self._floor_U
        self._seed = seed
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def visits(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(index_V, visit_V) of an epoch: which document, and how often it had been seen before."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, *self._draw_order(epoch))
        return self._cached[1:]

    def _draw_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        times_U = self._times(epoch)
        index_V = np.repeat(np.arange(len(times_U)), times_U)
        first_V = np.repeat(np.cumsum(times_U) - times_U, times_U)
        visit_V = self._seen_before(epoch)[index_V] + np.arange(len(index_V)) - first_V
        order_V = np.argsort(self._raw(epoch, ORDER, len(index_V)), kind="stable")
        if epoch == 0 and self._length_U is not None:
            order_V = order_V[np.argsort(self._length_U[index_V[order_V]], kind="stable")]
        return index_V[order_V], visit_V[order_V]

    def _times(self, epoch: int) -> np.ndarray:
        if not self._fraction_U.any():
            return self._floor_U
        uniform_U = (self._raw(epoch, DRAW, len(self._floor_U)) >> np.uint64(11)) * 2.0**-53
        return self._floor_U + (uniform_U < self._fraction_U)

    def _seen_before(self, epoch: int) -> np.ndarray:
        if not self._fraction_U.any():
            return epoch * self._floor_U
        return sum((self._times(earlier) for earlier in range(epoch)), np.zeros_like(self._floor_U))

    def _raw(self, epoch: int, purpose: int, size: int) -> np.ndarray:
        """uint64: raw bits, because the methods of numpy's Generator may change between its versions. The top bit keeps
        the key apart from those of the noise, which are (seed, document id)."""
        key = np.array([self._seed, 1 << 63 | epoch << 8 | purpose], np.uint64)
        return np.random.Philox(key=key).random_raw(size)
