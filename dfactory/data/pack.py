"""Documents -> rows: fill to whole blocks, pack, and write `[clean | view 1 | ... | view K]`.

Formulas: docs/method.md#documents-and-blocks.

Packing looks at costs only, never at tokens, so that the number of rows of a run can be computed beforehand. It keeps a
buffer of up to LOOKAHEAD documents: a row starts with the oldest one, so that none waits forever, and then takes the
largest that still fits.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dfactory.types import PADDING, AlignedDocument, Example, View, ViewBatch, common_length

LOOKAHEAD = 256


class PackedDocument(NamedTuple):
    """One document of a row with its views."""

    document: AlignedDocument
    views: Sequence[View]
    shared: int = 0  # positions of its clean stream that it has in common with the document before it, see `share`

    @property
    def clean_length(self) -> int:
        """Positions of its clean stream: up to the last block that a view holds, whose clean copy nobody would see."""
        viewed = [int(view.position_P[-1]) for view in self.views if len(view.position_P)]
        return max(viewed, default=0) // self.document.block_size * self.document.block_size

    @property
    def cost(self) -> int:
        """Positions that it takes in a row."""
        return self.clean_length - self.shared + sum(len(view.position_P) for view in self.views)


def share(documents: Sequence[PackedDocument]) -> list[PackedDocument]:
    """The same documents, to stand side by side in a row, where they share the clean stream of the whole blocks in which
    all of them begin alike, in all that enters an embedding: the first one pays for it. What one of them pays alone is
    `share` of it alone.

    Block size 2, answers in brackets, views of all their blocks: a b c [d e f g h] and a b c [d e i j k] share a b c d.
    """
    first, *others = documents
    length = min(packed.clean_length for packed in documents)
    for other in others:
        # streams of other blocks are other computations
        length *= other.document.block_size == first.document.block_size
        length = min(length, common_length(first.document.embedding_inputs, other.document.embedding_inputs))
    length -= length % first.document.block_size
    return [first._replace(shared=0), *(other._replace(shared=length) for other in others)]


def block_of(length, block_size: int, unit: int):
    """The block size of documents of `length` tokens (a number or an array): `block_size`, or where the document is
    shorter, the document, rounded up to a multiple of `unit` (if that is the smaller one)."""
    unit = min(unit, block_size)
    return np.minimum(block_size, -(-length // unit) * unit)


def align(
    example: Example, block_size: int, eos_id: int, unit: int | None = None, after_answer: str = "fill"
) -> AlignedDocument:
    """Fill with EOS up to the next multiple of `block_size`. With `unit`, a document shorter than a block becomes one
    block, filled up to the next multiple of `unit` only.

    The fill is trainable where the last token is: a decoder has to produce it. Block size 4, EOS = 0:

        ids        5 6 7 8 0  ->  5 6 7 8 0 0 0 0
        trainable  0 0 1 1 1  ->  0 0 1 1 1 1 1 1
        real       0 0 1 1 1  ->  0 0 1 1 1 0 0 0

    `after_answer: fill` does the same inside a record of several turns: in views, what follows an answer in its block is
    EOS that has to be produced. With `text` views show the record's next turn there, which no decoder sees.
    """
    size = int(block_of(len(example), block_size, unit or block_size))
    fill = -len(example) % size
    input_ids_T = np.concatenate([example.input_ids_T, np.full(fill, eos_id, np.int32)])
    trainable_T = np.concatenate([example.trainable_T, np.full(fill, fill and example.trainable_T[-1], bool)])
    eos_T = trainable_T & (input_ids_T == eos_id)
    # a trace ends with its block and needs no fill: what its decoder wrote there after EOS is fill
    real_length = _after_first(eos_T) if example.commit_step_T is not None else _before_repeats(eos_T)
    document = AlignedDocument(example.document_id, input_ids_T, trainable_T, size, example.commit_step_T, real_length)
    filled_T = _after_answer(trainable_T, size)
    if after_answer == "text" or not filled_T.any():
        return document
    return dataclasses.replace(
        document,
        trainable_T=trainable_T | filled_T,
        shown_ids_T=np.where(filled_T, np.int32(eos_id), input_ids_T),
        filled_T=filled_T,
    )


def _after_answer(trainable_T: np.ndarray, block_size: int) -> np.ndarray:
    """bool: the tokens after the last response token of a block that has one. A block in which another answer begins keeps
    what stands between the two: that one needs its question."""
    trainable_BS = trainable_T.reshape(-1, block_size)
    later_BS = np.cumsum(trainable_BS[:, ::-1], axis=1)[:, ::-1]  # response tokens from here to the end of the block
    return ((later_BS == 0) & trainable_BS.any(axis=1, keepdims=True)).ravel()


def _after_first(eos_T: np.ndarray) -> int:
    """The length up to and including the first EOS; the whole one without."""
    return int(eos_T.argmax()) + 1 if eos_T.any() else len(eos_T)


def _before_repeats(eos_T: np.ndarray) -> int:
    """The length without the repetitions of EOS at the end, whether `align` or the record put them there. Earlier ones end
    the earlier turns of a conversation."""
    before = int(eos_T[::-1].argmin()) if not eos_T.all() else len(eos_T)  # EOS at the end
    return len(eos_T) - max(before - 1, 0)


class Packer:
    """Greedy best-fit packing of a stream with bounded look-ahead. `waiting` (oldest first) and costs are all its state."""

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
        """Take one document of `cost` positions into the buffer. Raises ValueError if no row can hold it."""
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
        row = [self._take(next(iter(self._by_arrival)))]
        room = self.row_length - row[0][0]
        while self.packing and (index := bisect.bisect_right(self._by_cost, (room, 0))):
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


def collate(
    rows: Sequence[Sequence[PackedDocument]],
    block_size: int,
    *,
    pad_to: int | None = None,
    device: torch.device | str | None = None,
) -> ViewBatch:
    """Write rows as one ViewBatch [R, S]; S is `pad_to`, or else the longest row, at least one block.

    Each document stands as `[clean | view 1 | ... | view K]`, its number counting over the whole batch; targets run in
    row order. The clean stream ends before the last block that a view holds; a document of one block has none. What
    neighbours share stands once, as a trunk before the first of them. A row without documents is all padding. What views
    add (`columns_P`) comes to be columns of targets.
    Raises ValueError if a row is longer than `pad_to`, or if some views have a column and others lack it.
    """
    lengths = [sum(packed.cost for packed in row) for row in rows]
    width = max([block_size, *lengths]) if pad_to is None else pad_to
    if max(lengths, default=0) > width:
        raise ValueError(f"a row of {max(lengths)} positions is longer than pad_to {width}")
    writer = _Writer(len(rows), width, sum(map(len, rows)))
    for r, row in enumerate(rows):
        writer.start_row(r)
        for family in _families(row):
            writer.write(family)
    batch = writer.finish()
    return batch if device is None else batch.to(device)


def _families(row: Sequence[PackedDocument]) -> Iterator[Sequence[PackedDocument]]:
    """Neighbours that share a trunk together, every other document alone."""
    starts = [index for index, packed in enumerate(row) if not packed.shared]
    return (row[start:stop] for start, stop in itertools.pairwise([*starts, len(row)]))


class _Writer:
    """Fills flat arrays of R * S positions from left to right."""

    def __init__(self, num_rows: int, width: int, num_documents: int):
        self.shape, self.cursor, self.num_documents = (num_rows, width), 0, num_documents
        size = num_rows * width
        self.input_ids, self.position, self.view, self.block = (np.zeros(size, np.int64) for _ in range(4))
        self.document, self.trunk = (np.full(size, PADDING, np.int64) for _ in range(2))
        self.targets: list[tuple[np.ndarray, ...]] = []  # (index, ids, real, t, elbo_weight) a view
        self.columns: dict[str, list[np.ndarray]] = {}  # what views add, at their targets
        self.per_document: list[tuple[int, ...]] = []  # (id, response length, answer length, number of views)

    def start_row(self, row: int) -> None:
        self.cursor = row * self.shape[1]

    def write(self, family: Sequence[PackedDocument]) -> None:
        """The clean stream that the documents share, if they do, and then each of them."""
        first, number, shared = family[0].document, len(self.per_document), family[-1].shared
        trunk = number + (self.num_documents if shared else 0)
        self._write_stream(trunk, trunk, 0, first.block_size, np.arange(shared), first.input_ids_T[:shared])
        for packed in family:
            self._write_document(packed, shared, trunk)

    def _write_document(self, packed: PackedDocument, shared: int, trunk: int) -> None:
        document, clean, real_T = packed.document, packed.clean_length, packed.document.real_T
        write = functools.partial(self._write_stream, len(self.per_document), trunk)
        write(0, document.block_size, np.arange(shared, clean), document.input_ids_T[shared:clean])
        for number, view in enumerate(packed.views, start=1):
            index = self.cursor + np.flatnonzero(view.target_P)
            position, noise = view.position_P[view.target_P], (view.t_P, view.elbo_weight_P)
            targets = (index, document.view_ids_T[position], real_T[position])
            self.targets.append((*targets, *(column_P[view.target_P] for column_P in noise)))
            for name, column_P in view.columns_P.items():
                self.columns.setdefault(f"{name}_N", []).append(column_P[view.target_P])
            write(number, document.block_size, view.position_P, view.input_ids_P)
        lengths = int(document.trainable_T.sum()), int(real_T.sum())
        self.per_document.append((document.document_id, *lengths, len(packed.views)))

    def _write_stream(self, document: int, trunk: int, view: int, block_size: int, position_P, input_ids_P) -> None:
        span = slice(self.cursor, self.cursor + len(position_P))
        self.input_ids[span] = input_ids_P
        self.position[span] = position_P
        self.document[span], self.trunk[span], self.view[span] = document, trunk, view
        self.block[span] = position_P // block_size
        self.cursor = span.stop

    def finish(self) -> ViewBatch:
        def grid(flat: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(flat.reshape(self.shape))

        def targets(column: int, dtype) -> torch.Tensor:
            parts = [part[column] for part in self.targets]
            return torch.from_numpy(np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype))

        for name, parts in self.columns.items():
            if len(parts) != len(self.targets):
                raise ValueError(f"column {name}: {len(parts)} of {len(self.targets)} views have it; give it to all")
        per_document = torch.tensor(self.per_document, dtype=torch.int64).reshape(-1, 4)
        ids, responses, answers, views = per_document.T.contiguous()
        return ViewBatch(
            input_ids_RS=grid(self.input_ids),
            position_ids_RS=grid(self.position),
            document_RS=grid(self.document),
            view_RS=grid(self.view),
            block_RS=grid(self.block),
            trunk_RS=grid(self.trunk),
            target_index_N=targets(0, np.int64),
            target_ids_N=targets(1, np.int64),
            real_N=targets(2, np.bool_),
            t_N=targets(3, np.float32),
            elbo_weight_N=targets(4, np.float32),
            document_id_D=ids,
            response_length_D=responses,
            answer_length_D=answers,
            num_views_D=views,
            columns={name: torch.from_numpy(np.concatenate(parts)) for name, parts in self.columns.items()},
        )
