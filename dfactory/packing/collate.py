"""Packed documents -> one ViewBatch: writes `[clean | view 1 | ... | view K]` for each document."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from dfactory.columns import column_of
from dfactory.packing.share import PackedDocument
from dfactory.types import PADDING, WHOLE, View, ViewBatch


def collate(
    rows: Sequence[Sequence[PackedDocument]],
    block_size: int,
    *,
    pad_to: int | None = None,
    columns: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> ViewBatch:
    """One ViewBatch [R, S] of packed sequences (`rows`); S is `pad_to`, or else the longest of them, at least one block.

    Each document is written as `[clean | view 1 | ... | view K]`. Documents are numbered over the whole batch, and targets
    are in the order of positions. The clean stream ends before the last block that a view holds; a document of one block
    has none. A shared prefix is written once, before the first of its documents. A row without documents is all padding.
    Extra columns of views (`columns_P`) become columns of targets, those of documents (`columns`) columns of documents.
    `columns` names those that the batch must have even without a document.
    Raises ValueError if a row is longer than `pad_to`, or if some views or documents have a column and others lack it.
    """
    lengths = [sum(packed.cost for packed in row) for row in rows]
    width = max([1 if block_size == WHOLE else block_size, *lengths]) if pad_to is None else pad_to
    if max(lengths, default=0) > width:
        raise ValueError(f"a row of {max(lengths)} positions is longer than pad_to {width}")
    writer = _Writer(len(rows), width, sum(map(len, rows)))
    for r, row in enumerate(rows):
        writer.start_row(r)
        for bundle in _bundles(row):
            writer.write(bundle)
    batch = writer.finish(columns)
    return batch if device is None else batch.to(device)


def _bundles(row: Sequence[PackedDocument]) -> Iterator[Sequence[PackedDocument]]:
    """Groups of consecutive documents that share a prefix; every other document is a group of its own."""
    starts = [index for index, packed in enumerate(row) if not packed.shared]
    return (row[start:stop] for start, stop in itertools.pairwise([*starts, len(row)]))


class _Writer:
    """Fills flat arrays of R * S positions from left to right.

    A pair of two documents (D = 2), a b [c d] and a b [e f] in blocks of 2, each with a view that masks one token; S = 8:

        input_ids   a  b   M  d   e  M   _  _
        position    0  1   2  3   2  3
        document    2  2   0  0   1  1  -1 -1     the shared prefix is numbered D + its first document
        trunk       2  2   2  2   2  2            what the tokens of a document see before their own clean stream
        view        0  0   1  1   1  1            0: clean; the last block, [c d], needs no clean copy
        targets     index 2 and 5, ids c and f
        left        index 1 and 4: b of the shared prefix, and e of the view
    """

    def __init__(self, num_rows: int, width: int, num_documents: int):
        self.shape, self.cursor, self.num_documents = (num_rows, width), 0, num_documents
        size = num_rows * width  # flat, so that a target's index needs no row; `finish` makes [R, S] of it
        self.input_ids, self.position, self.view, self.block = (np.zeros(size, np.int64) for _ in range(4))
        self.document, self.trunk = (np.full(size, PADDING, np.int64) for _ in range(2))
        self.targets: list[tuple[np.ndarray, ...]] = []  # (index, left, clean left, ids, real, t, elbo_weight)
        self.columns_N: dict[str, list[np.ndarray]] = {}  # what views add, at their targets
        self.per_document: list[tuple[int, ...]] = []  # (id, response length, answer length, number of views)
        self.columns_D: list[Mapping[str, float]] = []  # what documents add

    def start_row(self, row: int) -> None:
        self.cursor = row * self.shape[1]

    def write(self, bundle: Sequence[PackedDocument]) -> None:
        """Write the shared prefix of a group, if it has one, and then each of its documents."""
        first, number, shared = bundle[0].document, len(self.per_document), bundle[-1].shared
        shared_from = self.cursor
        # Beyond the numbers of documents, so that sums by document never meet it; a document without one is its own.
        trunk = number + (self.num_documents if shared else 0)
        clean = np.arange(shared)
        self._write_stream(trunk, trunk, 0, clean // first.block_size, clean, first.input_ids_T[:shared])
        for packed in bundle:
            self._write_document(packed, shared, trunk, shared_from)

    def _write_document(self, packed: PackedDocument, shared: int, trunk: int, shared_from: int) -> None:
        document, clean, real_T = packed.document, packed.clean_length, packed.document.real_T
        write = functools.partial(self._write_stream, len(self.per_document), trunk)
        # where the clean token of each position lies
        clean_index = np.concatenate([shared_from + np.arange(shared), self.cursor + np.arange(clean - shared)])
        position = np.arange(shared, clean)
        if packed.scores_context:
            self._score_context(packed, position[position > 0], clean_index)
        write(0, position // document.block_size, position, document.input_ids_T[shared:clean])
        for number, view in enumerate(packed.views, start=1):
            # P positions of a view -> its targets. The ids to predict come from what views show, not from the clean stream:
            # fill in place of a following turn is to be predicted, and the clean stream has that turn.
            index = self.cursor + np.flatnonzero(view.target_P)
            position, noise = view.position_P[view.target_P], (view.t_P, view.elbo_weight_P)
            lefts = _left_neighbours(self.cursor, view, document.block_of(view.position_P), clean_index)
            targets = (index, *lefts, document.view_ids_T[position], real_T[position])
            self.targets.append((*targets, *(column_P[view.target_P] for column_P in noise)))
            for name, column_P in view.columns_P.items():
                self.columns_N.setdefault(f"{name}_N", []).append(column_P[view.target_P])
            write(number, document.block_of(view.position_P), view.position_P, view.input_ids_P)
        # Of the whole document, although a row may hold only a part of its views: losses are divided by lengths.
        lengths = int(document.trainable_T.sum()), int(real_T.sum())
        self.per_document.append((document.document_id, *lengths, len(packed.views)))
        self.columns_D.append(packed.columns)

    def _score_context(self, packed: PackedDocument, position: np.ndarray, clean_index: np.ndarray) -> None:
        """Make clean tokens targets, each read from its left neighbour. They are no part of a response, so not `real`."""
        nought = np.zeros(len(position), np.float32)
        ids = packed.document.input_ids_T[position]
        left = clean_index[position - 1]
        self.targets.append((clean_index[position], left, left, ids, nought != 0, nought, nought))
        for name, column_P in packed.views[0].columns_P.items():
            self.columns_N.setdefault(f"{name}_N", []).append(np.zeros(len(position), column_P.dtype))

    def _write_stream(self, document: int, trunk: int, view: int, block_P, position_P, input_ids_P) -> None:
        span = slice(self.cursor, self.cursor + len(position_P))
        self.input_ids[span] = input_ids_P
        self.position[span] = position_P
        self.document[span], self.trunk[span], self.view[span] = document, trunk, view
        self.block[span] = block_P
        self.cursor = span.stop

    def finish(self, columns: Sequence[str]) -> ViewBatch:
        def grid(flat: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(flat.reshape(self.shape))

        def targets(column: int, dtype) -> torch.Tensor:
            parts = [part[column] for part in self.targets]
            return torch.from_numpy(np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype))

        per_document = torch.tensor(self.per_document, dtype=torch.int64).reshape(-1, 4)
        ids, responses, answers, views = per_document.T.contiguous()
        batch = ViewBatch(
            input_ids_RS=grid(self.input_ids),
            position_ids_RS=grid(self.position),
            document_RS=grid(self.document),
            view_RS=grid(self.view),
            block_RS=grid(self.block),
            trunk_RS=grid(self.trunk),
            target_index_N=targets(0, np.int64),
            left_index_N=targets(1, np.int64),
            clean_left_index_N=targets(2, np.int64),
            target_ids_N=targets(3, np.int64),
            real_N=targets(4, np.bool_),
            t_N=targets(5, np.float32),
            elbo_weight_N=targets(6, np.float32),
            document_id_D=ids,
            response_length_D=responses,
            answer_length_D=answers,
            num_views_D=views,
        )
        return batch.with_columns(**self._columns(columns))

    def _columns(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The columns that views and documents add, and of those in `names` that nothing adds, empty ones."""
        named_D = {name for given in self.columns_D for name in given}
        found = {name: torch.zeros(0, dtype=column_of(name).dtype) for name in names}
        for name, parts in self.columns_N.items():
            if len(parts) != len(self.targets):
                raise ValueError(f"column {name}: {len(parts)} of {len(self.targets)} views have it; give it to all")
            found[name] = torch.from_numpy(np.concatenate(parts))
        for name in named_D:
            given = [columns[name] for columns in self.columns_D if name in columns]
            if len(given) != len(self.columns_D):
                raise ValueError(
                    f"column {name}: {len(given)} of {len(self.columns_D)} documents have it; give it to all"
                )
            found[name] = torch.tensor(given, dtype=column_of(name).dtype)
        return found


def _left_neighbours(
    start: int, view: View, block_P: np.ndarray, clean_index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The flattened index of each target's left neighbour, int64 [targets], twice: in its own view, and in the clean stream
    where the target is its block's first; `start` is where the view begins."""
    offset = np.flatnonzero(view.target_P)
    position = view.position_P[offset].astype(np.int64)
    beside = (offset > 0) & (view.position_P[offset - 1] == position - 1)
    inside = beside & (block_P[offset] == block_P[offset - 1])

    def neighbours(beside: np.ndarray) -> np.ndarray:
        left = start + offset - beside
        apart = ~beside & (position > 0)
        left[apart] = clean_index[position[apart] - 1]
        return left

    return neighbours(inside if view.after_clean else beside), neighbours(inside)
