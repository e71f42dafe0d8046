"""Rollouts as rows: every rank packs the rows of all ranks alike and keeps its own.

Those of one prompt stand side by side, so that the prompt is computed once a row. Learners train on these batches, and a
rollout actor that scores its own rollouts uses the same ones. The column `target_number_N` counts the targets of a rollout
through all of its views, whatever rows they lie in: numbers that belong to targets travel between the two in this order.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from dfactory.algorithms.rollouts import RolloutViews
from dfactory.noise import response_blocks
from dfactory.packing import PackedDocument, collate, pack_rows, share
from dfactory.rl.rollouts import ScoredRollout
from dfactory.types import AlignedDocument, View, ViewBatch


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """A rollout with those of its views that lie in one row."""

    number: int
    advantage: float
    share: float
    document: PackedDocument

    @property
    def response_blocks(self) -> int:
        return response_blocks(self.document.document)


Parts = list[_Part]  # of a rollout, of a family that shares a clean stream, of a row


@dataclasses.dataclass
class RolloutRows:
    """Makes the micro-batches of a rank from the rollouts of all ranks."""

    make_views: RolloutViews
    block_size: int
    row_length: int
    world_size: int = 1
    micro_batch_rows: int = 1
    train_after_eos: bool = True

    def build(self, rollouts: Sequence[ScoredRollout], rank: int = 0) -> list[ViewBatch]:
        """All ranks get equally many micro-batches. A rollout is all on one rank, because the ratio of a sequence needs all
        of its views (engine/replay.py). Column `rollout_D` is a rollout's place in `rollouts`."""
        groups: dict[int, list[list[_Part]]] = {}
        for number, scored in enumerate(rollouts):
            groups.setdefault(scored.group, []).append(self._parts(number, scored))
        packed = self._pack(list(groups.values()))
        size = self.micro_batch_rows
        micro_batches = -(-max(1, *map(len, packed)) // size)
        mine = packed[rank]
        mine += [[] for _ in range(micro_batches * size - len(mine))]
        return [self._collate(mine[i : i + size]) for i in range(0, len(mine), size)]

    def _pack(self, groups: list[list[Parts]]) -> list[list[Parts]]:
        """From the parts of each rollout of each group to the rows of each rank. What stays together shares the prompt,
        but ranks and rows are filled better by less. So groups are cut into pieces of every size, and the plan is taken
        whose fullest rank has the fewest rows, and then the fewest positions."""
        largest = max(map(len, groups), default=1)
        sizes = sorted({-(-largest // pieces) for pieces in range(1, largest + 1)})
        plans = [self._plan([piece for group in groups for piece in _cut(group, size)]) for size in sizes]
        return min(plans, key=lambda packed: max((len(rows), sum(map(_cost, rows))) for rows in packed))

    def _plan(self, pieces: list[list[Parts]]) -> list[list[Parts]]:
        """The rows of each rank, where each piece is all on one rank."""
        families_of = [self._families([part for parts in piece for part in parts]) for piece in pieces]
        shares = share_out([sum(map(_cost, families)) for families in families_of], self.world_size)
        packed = []
        for share_of_rank in shares:
            families = [family for number in share_of_rank for family in families_of[number]]
            rows = pack_rows(map(_cost, families), self.row_length)
            packed.append([_join([families[index] for index in row]) for row in rows])
        return packed

    def _families(self, parts: Parts) -> list[Parts]:
        """Parts of one group's rollouts by the rows that they take, each row's sharing what they begin with."""
        trunk = _share(parts)[-1].document.shared
        rows = pack_rows((part.document.cost - trunk for part in parts), self.row_length - trunk)
        return [_share([parts[index] for index in row]) for row in rows]

    def _parts(self, number: int, scored: ScoredRollout) -> Parts:
        """The rollout with as many views as a row holds, as often as it takes."""
        document, views = self.make_views(rollout_document(scored, self.block_size), scored.index)
        views = views if self.train_after_eos else _of_answer(views, document)
        packed, here = [], []
        for view in _numbered(views):
            if here and PackedDocument(document, [*here, view]).cost > self.row_length:
                packed.append(PackedDocument(document, here))
                here = []
            here.append(view)
        packed.append(PackedDocument(document, here))
        return [_Part(number, scored.advantage, 1 / len(packed), document) for document in packed]

    def _collate(self, rows: list[Parts]) -> ViewBatch:
        batch = collate([[part.document for part in row] for row in rows], self.block_size, pad_to=self.row_length)
        parts = [part for row in rows for part in row]
        return batch.with_columns(
            target_number_N=batch.columns.get("target_number_N", torch.zeros(0, dtype=torch.int64)),
            advantage_D=torch.tensor([part.advantage for part in parts], dtype=torch.float32),
            rollout_D=torch.tensor([part.number for part in parts], dtype=torch.int64),
            share_D=torch.tensor([part.share for part in parts], dtype=torch.float32),
            response_blocks_D=torch.tensor([part.response_blocks for part in parts], dtype=torch.int64),
        )


def _of_answer(views: list[View], document: AlignedDocument) -> list[View]:
    """The views with targets up to EOS only, those without any left out."""
    kept = [dataclasses.replace(view, target_P=view.target_P & document.real_T[view.position_P]) for view in views]
    return [view for view in kept if view.target_P.any()] or kept[:1]


def _numbered(views: list[View]) -> list[View]:
    """The views with the column `target_number`: how many targets of the rollout come before each."""
    numbered, before = [], 0
    for view in views:
        number_P = before + np.cumsum(view.target_P) - view.target_P
        numbered.append(dataclasses.replace(view, columns_P={**view.columns_P, "target_number": number_P}))
        before += int(view.target_P.sum())
    return numbered


def rollout_of(batch: ViewBatch) -> torch.Tensor:
    """The rollout of each target, int64 [N]."""
    return batch.columns["rollout_D"][batch.document_N]


def at_targets(batch: ViewBatch, values: Sequence[np.ndarray], index_N: torch.Tensor) -> torch.Tensor:
    """For each target the entry `index_N` of its rollout's array, float32 [N]; `values` has an array a rollout."""
    starts = torch.from_numpy(np.cumsum([0, *map(len, values)]))
    return torch.from_numpy(np.concatenate(values).astype(np.float32))[starts[rollout_of(batch)] + index_N]


def by_rollout(batches: Sequence[ViewBatch], value_N: Sequence[torch.Tensor], count: int) -> list[np.ndarray]:
    """What undoes `at_targets`: numbers at the targets of batches, as an array for each of `count` rollouts, in the order of
    `target_number_N`."""
    rollout = torch.cat([rollout_of(batch) for batch in batches]).numpy()
    number = torch.cat([batch.columns["target_number_N"] for batch in batches]).numpy()
    value = torch.cat(list(value_N)).cpu().numpy()[np.lexsort((number, rollout))]
    return np.split(value, np.cumsum(np.bincount(rollout, minlength=count))[:-1])


def _cost(parts: Parts) -> int:
    return sum(part.document.cost for part in parts)


def _share(parts: Parts) -> Parts:
    documents = share([part.document for part in parts])
    return [dataclasses.replace(part, document=document) for part, document in zip(parts, documents, strict=True)]


def _join(families: list[Parts]) -> Parts:
    """The parts of a row. Families of the same group that have met there share as one, if that takes less room."""
    groups: dict[int, Parts] = {}
    for family in families:
        groups.setdefault(family[0].document.document.document_id, []).extend(family)
    return [part for apart in groups.values() for part in min(apart, _share(apart), key=_cost)]


def _cut(group: list, size: int) -> list[list]:
    """Pieces of `size` at most, as even as can be."""
    pieces = -(-len(group) // size)
    return [group[len(group) * i // pieces : len(group) * (i + 1) // pieces] for i in range(pieces)]


def share_out(cost_U: list[int], num_ranks: int) -> list[list[int]]:
    """Units by rank, ascending: the costliest first, each to the rank that has the least so far.

    >>> share_out([5, 9, 3, 4], 2)
    [[1, 2], [0, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for unit in sorted(range(len(cost_U)), key=lambda unit: -cost_U[unit]):
        rank = loads.index(min(loads))
        shares[rank].append(unit)
        loads[rank] += cost_U[unit]
    return [sorted(share) for share in shares]


def rollout_document(scored: ScoredRollout, block_size: int) -> AlignedDocument:
    """Prompt and response to the end of the last decoded block, which is whole; all of the response is trainable.
    After the answer is fill, whatever the decoder put there."""
    rollout = scored.rollout
    ids = np.array([*rollout.prompt_ids, *rollout.token_ids], np.int32)
    prompt = len(rollout.prompt_ids)
    steps = np.full(len(ids), -1, np.int16)
    steps[prompt:] = rollout.step_in_block
    real_length = prompt + len(rollout.output_ids)
    return AlignedDocument(scored.group, ids, np.arange(len(ids)) >= prompt, block_size, steps, real_length)
