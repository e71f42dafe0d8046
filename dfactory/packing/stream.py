"""The rows of a run's records: an endless order of visits, packed by cost, with a cursor to go on from.

The stream knows neither ranks nor tokens. Every rank packs all of it, which is cheap, and builds only its own rows.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dfactory.packing.pack import Packer

AHEAD = 512  # visits that are asked for together


class CostByUnit(Protocol):
    """An array, or what computes its entries when they are asked for."""

    def __getitem__(self, unit: int) -> int: ...


class Order(Protocol):
    def visits(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(index_V, visit_V) of an epoch: which unit, and how often it had been seen before."""


class RowStream:
    """The global rows, each a list of (index of the unit, visit), independent of ranks and of tokens."""

    def __init__(
        self,
        order: Order,
        cost_U: CostByUnit,
        row_length: int,
        packing: bool,
        max_epochs: float | None,
        prefetch: Callable[[np.ndarray], None],
    ):
        self._order, self._cost_U, self._max_epochs, self._prefetch = order, cost_U, max_epochs, prefetch
        self._epoch, self._offset = 0, 0
        self._fetched = 0, 0  # epoch, and the visits of it that were asked for
        self._packer = Packer(row_length, packing)

    def set_costs(self, cost_U: CostByUnit) -> None:
        """From here on units cost this, and so do those that wait in the packer."""
        if cost_U is not self._cost_U:
            self._cost_U = cost_U
            self._packer.set_costs(lambda visit: int(cost_U[visit[0]]))

    def next_row(self) -> list[tuple[int, int]]:
        """The next row; empty when the run is over."""
        # The buffer is filled before every row, so the rows depend on the order alone and not on when they are asked for.
        while not self._packer.full and (visit := self._next_visit()):
            cost = int(self._cost_U[visit[0]])
            if cost:  # none where a streamed record turned out to be bad
                self._packer.add(cost, visit)
        return self._packer.next_row()

    @property
    def progress(self) -> float:
        """Epochs whose documents are in rows: those that wait in the packer are not."""
        length = max(len(self._order.visits(self._epoch)[0]), 1)
        return self._epoch + (self._offset - len(self._packer.waiting)) / length

    def state_dict(self) -> dict[str, Any]:
        waiting = [list(visit) for visit in self._packer.waiting]
        return {"epoch": self._epoch, "offset": self._offset, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a cursor; only for a new stream. What waits in the packer is part of the cursor: those visits lie
        before `offset`, but in no row yet."""
        self._epoch, self._offset = state["epoch"], state["offset"]
        for index, visit in state["waiting"]:
            self._packer.add(int(self._cost_U[index]), (index, visit))

    def _next_visit(self) -> tuple[int, int] | None:
        while self._offset >= self._length(self._epoch):
            if self._max_epochs is not None and self._epoch + 1 >= self._max_epochs:
                return None
            self._epoch, self._offset = self._epoch + 1, 0
        index_V, visit_V = self._order.visits(self._epoch)
        if self._fetched <= (self._epoch, self._offset):  # streamed records are tokenised many at a time
            self._prefetch(index_V[self._offset : self._offset + AHEAD])
            self._fetched = self._epoch, self._offset + AHEAD
        self._offset += 1
        return int(index_V[self._offset - 1]), int(visit_V[self._offset - 1])

    def _length(self, epoch: int) -> int:
        """Visits of an epoch that the run makes: the last one may be cut short."""
        length = len(self._order.visits(epoch)[0])
        if self._max_epochs is None or epoch + 1 <= self._max_epochs:
            return length
        return math.ceil(
            (self._max_epochs - epoch) * length - 1e-9
        )  # less rounding: 0.1 epochs of 10 are 1 visit, not 2
