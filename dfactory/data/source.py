"""Documents -> windows of micro-batches: the order, the packing, the share of each rank, and where to resume.

The unit is a document, or the two sides of a preference pair, which never part. There is one global stream of rows. Its
order is a pure function of (seed, epoch), it runs across epoch edges, and it does not know about ranks: a window is the
next world_size * accumulation * micro_batch_rows rows, dealt out like cards. Every rank packs the whole stream (by
lengths, which is cheap) and builds views for its own rows only.

The block size may follow a schedule of windows. Where it changes, order and cursor go on; what a document costs changes,
also for those that wait to be packed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from dfactory.data.examples import Examples
from dfactory.data.streaming import StreamedExamples
from dfactory.errors import CheckpointError, ConfigError
from dfactory.packing import PackedDocument, Packer, align, block_of, collate, share
from dfactory.types import AlignedDocument, View, ViewBatch

AddColumns = Callable[[ViewBatch, int], ViewBatch]
"""(micro-batch, its window's number from 0) -> the same with further columns."""

MakeViews = Callable[[AlignedDocument, int], Sequence[View]]
"""(document, visit) -> its views. `visit` counts from 0 how often the document was seen; at weight 1 it is the epoch."""

AHEAD = 512  # visits that are asked for together
ORDER, DRAW = 0, 1  # what a random stream of an epoch is for


class CostByUnit(Protocol):
    """An array, or what computes its entries when they are asked for."""

    def __getitem__(self, unit: int) -> int: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """Windows from number `first` on, as long as no later phase has begun."""

    first: int
    block_size: int
    cost_U: CostByUnit  # row positions that each unit takes


class RecordSource:
    """Windows of micro-batches from tokenised records.

    `weights` gives one weight a file: an epoch sees each of its records floor(weight) times, and once more with the
    probability of the fraction. `num_views` is what `make_views` returns for a document; each may cover the blocks that
    hold a trainable token. `max_epochs` may be fractional; None never ends.
    `block_phases` are (first window, block size), the last being `block_size`; None is `block_size` all the time. A
    document shorter than a block is one block, with fill up to a multiple of `block_size` at most.
    Raises ConfigError if a row cannot hold the longest document with its views.
    """

    def __init__(
        self,
        examples: Examples | StreamedExamples,
        weights: Sequence[float],
        make_views: MakeViews,
        *,
        num_views: int,
        block_size: int,
        eos_id: int,
        row_length: int,
        block_phases: Sequence[tuple[int, int]] | None = None,
        add_columns: AddColumns | None = None,
        packing: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_rows: int = 1,
        accumulation: int = 1,
        max_epochs: float | None = None,
        after_answer: str = "fill",
    ):
        self.examples, self.make_views, self.add_columns = examples, make_views, add_columns
        self.eos_id, self.row_length, self.packing = eos_id, row_length, packing
        self._final_block_size = block_size
        self.rank, self.world_size = rank, world_size
        self.micro_batch_rows, self.accumulation = micro_batch_rows, accumulation
        self.max_epochs, self.after_answer = max_epochs, after_answer
        self._identity = {"data": examples.fingerprint, "seed": seed, "weights": [float(w) for w in weights]}
        self._order = EpochOrder(np.asarray(weights, np.float64)[examples.file_index_U], seed)
        costs = {
            size: examples.map_units(functools.partial(self._costs, num_views=num_views, block_size=size))
            for _, size in block_phases or [(0, block_size)]
        }
        self.phases = [Phase(n, size, costs[size]) for n, size in block_phases or [(0, block_size)]]
        self._stream = self._new_stream()
        self._windows = 0
        self._begin = self.state_dict()
        self.metrics: dict[str, float] = {}

    @property
    def rows_per_window(self) -> int:
        return self.world_size * self.accumulation * self.micro_batch_rows

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with the fraction of the current one."""
        return self._stream.progress

    @property
    def num_windows(self) -> int | None:
        """Windows from where this source began, at the start or at a cursor, to the end of the run, found by packing them
        without tokens; None if it never ends."""
        if self.max_epochs is None:
            return None
        first = window = self._begin["windows"]
        stream = self._new_stream(self._begin)
        while self._next_rows(stream, window)[0]:
            window += 1
        return window - first

    def check(self, metrics: dict[str, float]) -> None:
        """Nothing that records say bounds what training finds."""

    def next_window(self) -> list[ViewBatch] | None:
        """This rank's `accumulation` micro-batches of the next window; None when the run is over.

        The last window is filled up with empty rows, so that all ranks run the same number of forwards.
        """
        rows, block_size = self._next_rows(self._stream, self._windows), self.phase_of(self._windows).block_size
        if not rows[0]:
            return None
        self._windows += 1
        mine = rows[self.rank :: self.world_size]
        micro_batches = (mine[i : i + self.micro_batch_rows] for i in range(0, len(mine), self.micro_batch_rows))
        batches = [self._build(batch, block_size) for batch in micro_batches]
        return [self.add_columns(batch, self._windows - 1) for batch in batches] if self.add_columns else batches

    def visits(self, num_windows: int) -> Iterator[tuple[int, int]]:
        """(document id, visit) of every unit of the first windows of all ranks, counted from where this source began, found
        by packing without tokens."""
        stream, first = self._new_stream(self._begin), self._begin["windows"]
        for window in range(first, first + num_windows):
            for row in self._next_rows(stream, window):
                for index, visit in row:
                    yield self.examples.unit_id(index), visit

    def state_dict(self) -> dict[str, Any]:
        """A cursor for JSON; it holds for any number of ranks."""
        return {**self._identity, "windows": self._windows, **self._stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises CheckpointError if records, seed or weights are others."""
        for name, value in self._identity.items():
            if state[name] != value:
                raise CheckpointError(
                    f"the checkpoint's {name} {state[name]} is now {value}: resume with the same datasets, records, "
                    "chat template, weights and seed, or start a new run"
                )
        self._stream = self._new_stream(state)
        self._windows = state["windows"]
        self._begin = self.state_dict()

    def phase_of(self, window: int) -> Phase:
        """The phase of a window, counted from 0."""
        return next(phase for phase in reversed(self.phases) if phase.first <= window)

    def _new_stream(self, cursor: dict[str, Any] | None = None) -> "RowStream":
        costs, prefetch = self.phases[0].cost_U, self.examples.prefetch
        stream = RowStream(self._order, costs, self.row_length, self.packing, self.max_epochs, prefetch)
        if cursor is not None:
            stream.load_state_dict(cursor)
        return stream

    def _next_rows(self, stream: "RowStream", window: int) -> list[list[tuple[int, int]]]:
        """The rows of a window, empty ones where the run is over."""
        stream.set_costs(self.phase_of(window).cost_U)
        return [stream.next_row() for _ in range(self.rows_per_window)]

    def _costs(self, examples: Examples, num_views: int, block_size: int) -> np.ndarray:
        """Row positions that each unit takes: the clean blocks that a view sees, once where both sides of a pair have
        them, and the response blocks of every view."""
        clean_E, response_E = examples.block_counts(block_size)
        size_E = block_of(examples.length_E, block_size, self._final_block_size)
        cost_E = size_E * (clean_E + num_views * response_E)
        cost_UM, clean_UM = (array.reshape(-1, examples.unit_size) for array in (cost_E, clean_E))
        shared_U = np.minimum(examples.common_length_U // block_size, clean_UM.min(axis=1))
        cost_U = cost_UM.sum(axis=1) - block_size * shared_U
        longest = int(cost_U.argmax())
        if cost_U[longest] > self.row_length:
            raise ConfigError(
                f"row_length {self.row_length} cannot hold {examples.unit(longest)[0].origin}, which takes "
                f"{cost_U[longest]} positions with {num_views} view(s) in blocks of {block_size}: raise row_length or "
                "lower max_length"
            )
        return cost_U

    def _build(self, rows: list[list[tuple[int, int]]], block_size: int) -> ViewBatch:
        packed = [[side for unit in row for side in self._pack(*unit, block_size)] for row in rows]
        batch = collate(packed, self._final_block_size, pad_to=self.row_length if self.packing else None)
        visits = [visit for row in rows for _, visit in row for _ in range(self.examples.unit_size)]
        return batch.with_columns(visit_D=torch.tensor(visits, dtype=torch.int64))

    def _pack(self, index: int, visit: int, block_size: int) -> list[PackedDocument]:
        unit = [
            align(example, block_size, self.eos_id, self._final_block_size, self.after_answer)
            for example in self.examples.unit(index)
        ]
        return share([PackedDocument(document, self.make_views(document, visit)) for document in unit])


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


class RowStream:
    """The global rows, each a list of (index of the unit, visit), independent of ranks and of tokens."""

    def __init__(
        self,
        order: EpochOrder,
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
        """Only for a new stream."""
        self._epoch, self._offset = state["epoch"], state["offset"]
        for index, visit in state["waiting"]:
            self._packer.add(int(self._cost_U[index]), (index, visit))

    def _next_visit(self) -> tuple[int, int] | None:
        while self._offset >= self._length(self._epoch):
            if self._max_epochs is not None and self._epoch + 1 >= self._max_epochs:
                return None
            self._epoch, self._offset = self._epoch + 1, 0
        index_V, visit_V = self._order.visits(self._epoch)
        if self._fetched <= (self._epoch, self._offset):
            self._prefetch(index_V[self._offset : self._offset + AHEAD])
            self._fetched = self._epoch, self._offset + AHEAD
        self._offset += 1
        return int(index_V[self._offset - 1]), int(visit_V[self._offset - 1])

    def _length(self, epoch: int) -> int:
        """Visits of an epoch that the run makes: the last one may be cut short."""
        length = len(self._order.visits(epoch)[0])
        if self._max_epochs is None or epoch + 1 <= self._max_epochs:
            return length
        return math.ceil((self._max_epochs - epoch) * length - 1e-9)
