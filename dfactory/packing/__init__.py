"""From tokenised documents to batches: align, share, pack, collate. Records and rollouts take the same way.

Example --align--> AlignedDocument --noise/--> PackedDocument --share, pack--> rows --collate--> ViewBatch
"""

from dfactory.packing.align import align, block_of
from dfactory.packing.collate import collate
from dfactory.packing.pack import LOOKAHEAD, Packer, pack_rows
from dfactory.packing.share import PackedDocument, share

__all__ = ["LOOKAHEAD", "PackedDocument", "Packer", "align", "block_of", "collate", "pack_rows", "share"]
