"""Packs documents into sequences of bounded length (rows): greedy best fit over a stream, with bounded look-ahead.

Packing depends on costs only, never on tokens, so the number of packed sequences of a run can be computed in advance. It
keeps a buffer of up to LOOKAHEAD documents. A packed sequence starts with the oldest document, so that none waits forever,
and then takes the largest that still fits.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

LOOKAHEAD = 256


class Packer:
    """Greedy best-fit packing of a stream with bounded look-ahead. Its whole state is `waiting` (oldest first) and costs."""

    def __init__(self, row_length: int, packing: bool = True, lookahead: int = LOOKAHEAD):
        self.row_length = row_length
        self.packing = packing
        self.lookahead = lookahead if packing else 1
        self._arrivals = 0
        self._by_cost: list[tuple[int, int]] = []  # (cost, -arrival), ascending: among equals the oldest comes last
        self._by_arrival: dict[int, tuple[int, Any]] = {}

    @property
    def waiting(self) -> list[Any]:
        return [document for _, document in self._by_arrival.values()]

    @property
    def full(self) -> bool:
        return len(self._by_arrival) >= self.lookahead

    def add(self, cost: int, document: Any) -> None:
        """Add one document of `cost` positions to the buffer. Raises ValueError if no row can hold it."""
        if cost > self.row_length:
            raise ValueError(f"a document of {cost} positions does not fit a row of {self.row_length}")
        self._by_arrival[self._arrivals] = (cost, document)
        bisect.insort(self._by_cost, (cost, -self._arrivals))
        self._arrivals += 1

    def set_costs(self, cost_of: Callable[[Any], int]) -> None:
        """Give the waiting documents new costs; their order stays."""
        waiting = self.waiting
        self._by_cost, self._by_arrival = [], {}
        for document in waiting:
            self.add(cost_of(document), document)

    def next_row(self) -> list[Any]:
        """The documents of the next row, none if the buffer is empty. Fill the buffer up before every call."""
        if not self._by_arrival:
            return []
        row = [self._take(next(iter(self._by_arrival)))]  # the oldest: dicts keep the order of arrival
        room = self.row_length - row[0][0]
        while self.packing and (index := bisect.bisect_right(self._by_cost, (room, 0))):
            # (room, 0) sorts after every (room, -arrival), so index - 1 is the largest that fits, the oldest among equals.
            row.append(self._take(-self._by_cost[index - 1][1]))
            room -= row[-1][0]
        return [document for _, document in row]

    def _take(self, arrival: int) -> tuple[int, Any]:
        cost, document = self._by_arrival.pop(arrival)
        self._by_cost.pop(bisect.bisect_left(self._by_cost, (cost, -arrival)))
        return cost, document


def pack_rows(
    costs: Iterable[int], row_length: int, packing: bool = True, lookahead: int = LOOKAHEAD
) -> Iterator[list[int]]:
    """Pack a stream of costs (positions a document) into rows: lists of indices into the stream.

    `packing=False` gives one document a row. Raises ValueError for a document that no row can hold.
    """
    packer = Packer(row_length, packing, lookahead)
    stream = enumerate(costs)
    while True:
        while not packer.full and (entry := next(stream, None)):
            packer.add(entry[1], entry[0])
        row = packer.next_row()
        if not row:
            return
        yield row
