"""Which records an epoch visits, in which order: a pure function of weights, seed and epoch."""

import numpy as np

ORDER, DRAW = 0, 1  # what a random stream of an epoch is for


class EpochOrder:
    """Which units (documents, or pairs) an epoch visits, in which order: a pure function of (weights, seed, epoch)."""

    def __init__(self, weight_U: np.ndarray, seed: int):
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
