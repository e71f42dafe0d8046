"""Rollouts as micro-batches: every rank packs the rollouts of all ranks alike and keeps its own rows (packing/plan.py).

    ScoredRollout --rollout_document, make_views--> a document and views --spread, plan_ranks--> rows --collate--> ViewBatch

Learners train on these batches, and a rollout actor that scores its own rollouts uses the same ones. The column
`target_number_N` counts the targets of a rollout through all of its views, whatever rows they lie in: numbers that belong
to targets travel between the two in this order.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from dfactory.algorithms.rollouts import RolloutViews
from dfactory.noise import response_blocks
from dfactory.packing import PackedDocument, block_of, collate, plan_ranks, spread
from dfactory.rl.rollouts import ScoredRollout
from dfactory.types import UNDECODED, WHOLE, AlignedDocument, View, ViewBatch

COLUMNS = ("advantage_D", "response_blocks_D", "rollout_D", "share_D", "target_number_N")


@dataclasses.dataclass
class RolloutRows:
    """Makes the micro-batches of a rank from the rollouts of all ranks."""

    make_views: RolloutViews
    block_size: int  # WHOLE with full attention
    row_length: int
    world_size: int = 1
    micro_batch_rows: int = 1
    train_after_eos: bool = True
    padded: bool = True  # all rows to row_length; see pads_on

    def build(self, rollouts: Sequence[ScoredRollout], rank: int = 0) -> list[ViewBatch]:
        """All ranks get equally many micro-batches. A rollout is all on one rank, because the ratio of a sequence needs all
        of its views (engine/replay.py). Column `rollout_D` is a rollout's place in `rollouts`."""
        groups: dict[int, list[list[PackedDocument]]] = {}
        for number, scored in enumerate(rollouts):
            groups.setdefault(scored.group, []).append(self._parts(number, scored))
        ranks = plan_ranks(list(groups.values()), self.row_length, self.world_size)
        size = self.micro_batch_rows
        micro_batches = -(-max(1, *map(len, ranks)) // size)
        mine = ranks[rank]
        mine += [[] for _ in range(micro_batches * size - len(mine))]  # rows without documents: forwards are collective
        rows = (mine[i : i + size] for i in range(0, len(mine), size))
        width = self.row_length if self.padded else None
        return [collate(some, self.block_size, pad_to=width, columns=COLUMNS) for some in rows]

    def _parts(self, number: int, scored: ScoredRollout) -> list[PackedDocument]:
        """The rollout with as many views as a row holds, as often as it takes."""
        document, views = self.make_views(rollout_document(scored, self.block_size), scored.index)
        views = views if self.train_after_eos else _of_answer(views, document)
        parts = spread(document, _numbered(views), self.row_length)
        columns = {
            "advantage_D": scored.advantage,
            "response_blocks_D": response_blocks(document),
            "rollout_D": number,
            "share_D": 1 / len(parts),
        }
        return [part._replace(columns=columns) for part in parts]


def pads_on(device: torch.device | str) -> bool:
    """Whether rows are padded there: a GPU's kernels want one shape, and a CPU would compute the padding."""
    return torch.device(device).type != "cpu"


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


def rollout_document(scored: ScoredRollout, block_size: int) -> AlignedDocument:
    """Prompt and response to the end of the last decoded block, which is whole; all tokens of the response are trainable,
    masks that are left are not. After the answer is fill, whatever the decoder put there. With WHOLE blocks the rest of the
    canvas follows as masks, because every forward saw it."""
    rollout = scored.rollout
    prompt = len(rollout.prompt_ids)
    ids = np.array([*rollout.prompt_ids, *rollout.token_ids, *rollout.masks_left], np.int32)
    steps = np.full(len(ids), UNDECODED, np.int16)
    steps[:prompt] = -1
    response = rollout.step_in_document if block_size == WHOLE else rollout.step_in_block
    steps[prompt : prompt + len(response)] = response
    trainable = (np.arange(len(ids)) >= prompt) & (steps != UNDECODED)
    size = int(block_of(len(ids), block_size, block_size))
    return AlignedDocument(scored.group, ids, trainable, size, steps, prompt + len(rollout.output_ids))
