"""Documents -> windows of micro-batches: the order, the packing, the share of each rank, and where to resume.

The unit is a document, or the two sides of a preference pair, which never part. There is one global stream of rows. Its
order is a pure function of (seed, epoch), it runs across epoch edges, and it does not know about ranks: a window is the
next world_size * accumulation * micro_batch_rows rows, or the next rows until their records have enough response tokens,
dealt out like cards. Every rank packs the whole stream (by lengths, which is cheap) and builds views for its own rows only.

The block size may follow a schedule of windows. Where it changes, order and cursor go on; what a document costs changes,
also for those that wait to be packed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dfactory.data.examples import Examples
from dfactory.data.order import EpochOrder, tempered
from dfactory.data.streaming import StreamedExamples
from dfactory.errors import CheckpointError, ConfigError
from dfactory.packing import (
    CostByUnit,
    PackedDocument,
    RowStream,
    align,
    align_canvases,
    block_of,
    collate,
    costs_by_length,
    share,
)
from dfactory.types import AlignedDocument, View, ViewBatch

AddColumns = Callable[[ViewBatch, int], ViewBatch]
"""(micro-batch, its window's number from 0) -> the same with further columns."""

MakeViews = Callable[[AlignedDocument, int], Sequence[View]]
"""(document, visit) -> its views. `visit` counts from 0 how often the document was seen; at weight 1 it is the epoch."""


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
    `canvas` is the length of canvases, in a model with causal context (`block_size` is 1 then); with `scores_context` the
    clean tokens are targets too. With `window_tokens` a window ends with the row that brings it to so many response tokens,
    whatever the ranks, and empty rows fill its last micro-batches up; `accumulation` is not read. `mixing_temperature`
    flattens the files' shares of an epoch, `curriculum` "length" sorts the first one. Raises ConfigError if a row cannot
    hold the longest document with its views.
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
        window_tokens: int | None = None,
        max_epochs: float | None = None,
        after_answer: str = "fill",
        fill_unit: int | None = None,
        canvas: int | None = None,
        scores_context: bool = False,
        mixing_temperature: float = 1.0,
        curriculum: str = "none",
    ):
        self.examples, self.make_views, self.add_columns = examples, make_views, add_columns
        self.eos_id, self.row_length, self.packing = eos_id, row_length, packing
        self.canvas, self.scores_context = canvas, scores_context
        self._final_block_size, self._fill_unit = block_size, fill_unit or block_size
        self.rank, self.world_size = rank, world_size
        self.micro_batch_rows, self.accumulation = micro_batch_rows, accumulation
        self._window_tokens = window_tokens
        self._tokens_U = None if window_tokens is None else examples.map_units(lambda some: some.trainable_U)
        self.max_epochs, self.after_answer = max_epochs, after_answer
        weights = tempered(weights, np.bincount(examples.file_index_U, minlength=len(weights)), mixing_temperature)
        self._identity = {"data": examples.fingerprint, "seed": seed, "weights": [float(w) for w in weights]}
        lengths = examples.unit_lengths if curriculum == "length" else None
        self._order = EpochOrder(np.asarray(weights, np.float64)[examples.file_index_U], seed, lengths)
        costs = {
            size: examples.map_units(functools.partial(self._costs, num_views=num_views, block_size=size))
            for _, size in block_phases or [(0, block_size)]
        }
        self.phases = [Phase(n, size, costs[size]) for n, size in block_phases or [(0, block_size)]]
        self._stream = self._new_stream()
        self._windows = 0  # that were handed out; add_columns and the schedule of block sizes go by it
        self._begin = self.state_dict()
        self.metrics: dict[str, float] = {}

    @property
    def rows_per_window(self) -> int:
        """Of a window that is not cut by tokens."""
        return self.world_size * self.accumulation * self.micro_batch_rows

    @property
    def window_size(self) -> str:
        """How much a window takes, in words."""
        tokens = self._window_tokens
        return f"{self.rows_per_window} rows" if tokens is None else f"rows of {tokens:,} response tokens or more"

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
        """This rank's micro-batches of the next window, `accumulation` or by tokens; None when the run is over.

        The last window, or each by tokens, is filled up with empty rows, so that all ranks run the same number of forwards.
        """
        rows, block_size = self._next_rows(self._stream, self._windows), self.phase_of(self._windows).block_size
        if not rows[0]:
            return None
        self._windows += 1
        # Rows are dealt out one by one, so a global batch holds the same rows for every number of ranks.
        mine = rows[self.rank :: self.world_size]
        micro_batches = (mine[i : i + self.micro_batch_rows] for i in range(0, len(mine), self.micro_batch_rows))
        batches = [self._build(batch, block_size) for batch in micro_batches]
        return [self.add_columns(batch, self._windows - 1) for batch in batches] if self.add_columns else batches

    def next_units(self) -> list[int] | None:
        """The units of the next window on all ranks, in place of its batches; None when the run is over. For a trainer of
        another kind of model, which learns from the same records at the same step."""
        rows = self._next_rows(self._stream, self._windows)
        if not rows[0]:
            return None
        self._windows += 1
        return [index for row in rows for index, _ in row]

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

    def _new_stream(self, cursor: dict[str, Any] | None = None) -> RowStream:
        costs, prefetch = self.phases[0].cost_U, self.examples.prefetch
        stream = RowStream(self._order, costs, self.row_length, self.packing, self.max_epochs, prefetch)
        if cursor is not None:
            stream.load_state_dict(cursor)
        return stream

    def _next_rows(self, stream: RowStream, window: int) -> list[list[tuple[int, int]]]:
        """The rows of a window, empty ones where the run is over."""
        stream.set_costs(self.phase_of(window).cost_U)
        if self._window_tokens is None:
            return [stream.next_row() for _ in range(self.rows_per_window)]
        rows, tokens = [], 0
        while tokens < self._window_tokens and (row := stream.next_row()):
            rows.append(row)
            tokens += sum(int(self._tokens_U[index]) for index, _ in row)
        at_once = self.world_size * self.micro_batch_rows
        return rows + [[] for _ in range(-len(rows) % at_once if rows else at_once)]

    def _costs(self, examples: Examples, num_views: int, block_size: int) -> np.ndarray:
        """Row positions that each unit takes: the clean blocks that a view sees, once where both sides of a pair have
        them, and the response blocks of every view."""
        clean_E, response_E = (
            examples.block_counts(block_size) if self.canvas is None else examples.canvas_counts(self.canvas)
        )
        clean_E = examples.length_E if self.scores_context else clean_E
        # E documents: a short one is a block of its own size. U units: documents, or pairs.
        size_E = block_of(examples.length_E, block_size, self._fill_unit)
        common_U, unit_size = examples.common_length_U, examples.unit_size
        cost_U = costs_by_length(size_E, clean_E, response_E, common_U, num_views, unit_size)
        longest = int(cost_U.argmax())
        if cost_U[longest] > self.row_length:
            raise ConfigError(
                f"row_length {self.row_length} cannot hold {examples.unit(longest)[0].origin}, which takes "
                f"{cost_U[longest]} positions with {num_views} view(s) in blocks of {block_size}: raise row_length or "
                "lower max_length"
            )
        return cost_U

    def _build(self, rows: list[list[tuple[int, int]]], block_size: int) -> ViewBatch:
        """Rows of (unit, visit) -> a micro-batch. Only here are tokens read and noise drawn."""
        weights = {index: self.examples.unit_weight(index) for row in rows for index, _ in row}
        if all(weight == 1 for weight in weights.values()):
            weights = {}
        packed = [
            [document for index, visit in row for document in self._pack(index, visit, block_size, weights.get(index))]
            for row in rows
        ]
        width = self.row_length if self.packing else None
        return collate(packed, self._final_block_size, pad_to=width, columns=("visit_D",))

    def _pack(self, index: int, visit: int, block_size: int, weight: float | None) -> list[PackedDocument]:
        """A unit of the examples with its views: a document, or the two sides of a pair, which share their prompt. `weight`
        becomes a column of the batch, where one of its records has a weight."""
        unit = [
            align_canvases(example, self.canvas, self.eos_id)
            if self.canvas is not None
            else align(example, block_size, self.eos_id, self._fill_unit, self.after_answer)
            for example in self.examples.unit(index)
        ]
        columns = {"visit_D": visit} if weight is None else {"visit_D": visit, "weight_D": weight}
        views = (self.make_views(document, visit) for document in unit)
        return share([PackedDocument(*both, 0, columns, self.scores_context) for both in zip(unit, views, strict=True)])
