"""From tokenised documents to batches: align, share, pack, collate. Records and rollouts use the same functions.

    Example --align--> AlignedDocument --noise/--> PackedDocument --share, pack--> rows --collate--> ViewBatch

    align.py     fill with EOS to whole blocks
    share.py     a document with its views; the prefix that neighbours share; what it all costs
    pack.py      costs -> rows, a stream of any length
    stream.py    the rows of a run's records, with a cursor
    plan.py      the rows of all ranks, of groups that begin alike
    collate.py   rows -> tensors

What a batch lacks after that is added by sources that wrap each other, as columns (dfactory/columns.py):

    RecordSource: visit_D  ->  drafts: drafted targets filled in  ->  reference: reference_elbo_D  ->  the training step
    RolloutSource: rollout_D, advantage_D, old_logprob_N, reference_logprob_N  ->  the training step
"""

from dfactory.packing.align import align, align_canvases, block_of, canvases, whole_blocks
from dfactory.packing.collate import collate
from dfactory.packing.pack import LOOKAHEAD, Packer, pack_rows
from dfactory.packing.plan import plan_ranks, share_out, spread
from dfactory.packing.share import PackedDocument, costs_by_length, share, total_cost
from dfactory.packing.stream import CostByUnit, RowStream

__all__ = [
    "LOOKAHEAD",
    "CostByUnit",
    "PackedDocument",
    "Packer",
    "RowStream",
    "align",
    "align_canvases",
    "block_of",
    "canvases",
    "collate",
    "costs_by_length",
    "pack_rows",
    "plan_ranks",
    "share",
    "share_out",
    "spread",
    "total_cost",
    "whole_blocks",
]
