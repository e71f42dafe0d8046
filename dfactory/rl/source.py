"""RolloutSource: the batch source of reinforcement learning. The training loop cannot tell it from one that reads records.

`next_window` does, on every learner rank alike:

    1. publish the weights of this policy version (all ranks gather, rank 0 puts)
    2. ask the controller for the scored rollouts of this step; all ranks get the same ones
    3. documents, views, rows; each rank takes its share of the rollouts, and those of one prompt stand side by side,
       so that the prompt is computed once a row
    4. score them as the policy is now: the old log-probabilities, on the very views that are trained on; and as the
       reference is, where there is a KL term

`check` then holds training to it: at the first step on new rollouts the ratio is 1, because no step lies between.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch

from dfactory.data.pack import PackedDocument, collate, pack_rows, share
from dfactory.errors import RolloutError
from dfactory.rl.rollouts import RolloutBatch, ScoredRollout
from dfactory.rl.views import RolloutViews
from dfactory.types import AlignedDocument, TokenScores, ViewBatch
from dfactory.views import response_blocks

Score = Callable[[ViewBatch], TokenScores]

RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""By dtype: how far, in nats a target on average, two forwards of the same policy may lie apart."""


class Feed(Protocol):
    """The controller, as a learner sees it."""

    def publish(self, version: int, groups: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Make a version of the weights the rollout actors' next one; times and bytes. Only rank 0 calls it."""

    def next_batch(self, version: int, next_group: int) -> RolloutBatch: ...


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


class RolloutSource:
    """Windows of micro-batches from rollouts.

    Two callables come from the engine. `weights` yields the groups of named tensors to publish; every rank has to run
    through it, because sharded parameters are gathered by all. `score` is the policy in training, without gradient;
    `reference` the same of the reference, None without a KL term. `num_iterations` windows are made of the same rollouts,
    with the same views; a run that is resumed between them goes on with new rollouts.
    """

    def __init__(
        self,
        feed: Feed,
        weights: Callable[[], Iterable[dict[str, torch.Tensor]]],
        score: Score,
        make_views: RolloutViews,
        *,
        block_size: int,
        row_length: int,
        rank: int,
        world_size: int,
        micro_batch_rows: int,
        num_iterations: int = 1,
        reference: Score | None = None,
        ratio_tolerance: float = RATIO_TOLERANCE["float32"],
    ):
        self.feed, self.weights, self.make_views = feed, weights, make_views
        self.score, self.reference = score, reference
        self.block_size, self.row_length = block_size, row_length
        self.rank, self.world_size, self.micro_batch_rows = rank, world_size, micro_batch_rows
        self.num_iterations, self.ratio_tolerance = num_iterations, ratio_tolerance
        self.version = 0  # policy versions made so far: optimiser steps
        self.next_group = 0
        self.epoch = 0.0  # passes over the prompts
        self.metrics: dict[str, float] = {}
        self._window: list[ViewBatch] = []
        self._uses = 0
        self._new = False  # whether the last window was the first one of its rollouts

    def next_window(self) -> list[ViewBatch] | None:
        self._new = self._uses == 0
        if self._new:
            published = self._publish()
            batch = self.feed.next_batch(self.version, self.next_group)
            self._window = [self._with_scores(batch) for batch in self._build(batch.rollouts)]
            self.next_group, self.epoch = batch.next_group, batch.epoch
            self.metrics = batch.metrics | published
        self._uses = (self._uses + 1) % self.num_iterations
        self.version += 1
        return self._window

    def check(self, metrics: dict[str, float]) -> None:
        """Raises RolloutError if the policy had changed before the first step on new rollouts. `logprob_change` compares
        with the old log-probabilities; the two passes of a window that is replayed are compared as `replay_gap`."""
        for name in ("logprob_change", "replay_gap"):
            if self._new and metrics.get(name, 0.0) > self.ratio_tolerance:  # NaN: engine/nonfinite.py has seen to it
                raise RolloutError(
                    f"{name} {metrics[name]:.3g} at the first step on new rollouts, in nats a target; at most "
                    f"{self.ratio_tolerance:g} is rounding: two forwards of one policy must agree, or the ratio is not 1. "
                    "Likely causes: lora_dropout (set it to 0), or a kernel that is not deterministic (try another "
                    "attn_implementation)"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "next_group": self.next_group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version, self.next_group = state["version"], state["next_group"]

    def _publish(self) -> dict[str, float]:
        groups = self.weights()
        if self.rank == 0:
            return self.feed.publish(self.version, groups)
        for _ in groups:  # the gathers are collective
            pass
        return {}

    def _build(self, rollouts: list[ScoredRollout]) -> list[ViewBatch]:
        """Every rank packs the rows of all ranks alike and keeps its own; all get equally many micro-batches. A rollout
        is all on one rank, because the ratio of a sequence needs all of its views (engine/replay.py)."""
        groups: dict[int, list[list[_Part]]] = {}
        for number, scored in enumerate(rollouts):
            groups.setdefault(scored.group, []).append(self._parts(number, scored))
        packed = self._pack(list(groups.values()))
        size = self.micro_batch_rows
        micro_batches = -(-max(1, *map(len, packed)) // size)
        mine = packed[self.rank]
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

    def _with_scores(self, batch: ViewBatch) -> ViewBatch:
        columns = {"old_logprob_N": self.score(batch).logprob_N.cpu()}
        if self.reference is not None:
            columns["reference_logprob_N"] = self.reference(batch).logprob_N.cpu()
        return batch.with_columns(**columns)

    def _parts(self, number: int, scored: ScoredRollout) -> Parts:
        """The rollout with as many views as a row holds, as often as it takes."""
        document, views = self.make_views(rollout_document(scored, self.block_size), scored.index)
        packed, here = [], []
        for view in views:
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
            advantage_D=torch.tensor([part.advantage for part in parts], dtype=torch.float32),
            rollout_D=torch.tensor([part.number for part in parts], dtype=torch.int64),
            share_D=torch.tensor([part.share for part in parts], dtype=torch.float32),
            response_blocks_D=torch.tensor([part.response_blocks for part in parts], dtype=torch.int64),
        )


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
    """Prompt and response to the end of the last decoded block, which is whole; all of the response is trainable. Behind
    the answer is fill, whatever the decoder put there."""
    rollout = scored.rollout
    ids = np.array([*rollout.prompt_ids, *rollout.token_ids], np.int32)
    prompt = len(rollout.prompt_ids)
    steps = np.full(len(ids), -1, np.int16)
    steps[prompt:] = rollout.step_in_block
    real_length = prompt + len(rollout.output_ids)
    return AlignedDocument(scored.group, ids, np.arange(len(ids)) >= prompt, block_size, steps, real_length)
