"""Documents with their views, and their shared prefix: the clean blocks that documents have in common are packed once.

A clean stream sees only itself, block by block, so equal first blocks are equal computations. The two sides of a
preference pair, or the rollouts of a prompt, are computed once up to the first block in which they differ.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from dfactory.types import AlignedDocument, View, common_length

NO_COLUMNS: Mapping[str, float] = MappingProxyType({})


class PackedDocument(NamedTuple):
    """One document of a packed sequence with its views."""

    document: AlignedDocument
    views: Sequence[View]
    shared: int = 0  # length of the prefix that it shares with the document before it, see `share`
    columns: Mapping[str, float] = NO_COLUMNS  # one number of this document for each of the batch's columns `*_D`
    scores_context: bool = (
        False  # whether the tokens of the clean stream are targets too, each read from the one before
    )

    @property
    def clean_length(self) -> int:
        """Length of its clean stream: up to the last block that a view holds, because no token sees that block's clean
        copy; all its real tokens where they are targets."""
        if self.scores_context:
            return self.document.real_length
        size, last = self.document.block_size, [view.position_P[-1:] for view in self.views]
        return max((int(block) * size for position in last for block in self.document.block_of(position)), default=0)

    @property
    def cost(self) -> int:
        """Positions that it takes in a packed sequence."""
        return self.clean_length - self.shared + sum(len(view.position_P) for view in self.views)


def share(documents: Sequence[PackedDocument]) -> list[PackedDocument]:
    """The same documents with their shared prefix: the whole blocks at the start that are equal in all of them, in all
    embedding inputs. They must be packed next to each other; the first one's cost includes the prefix.

    Block size 2, answers in brackets, views of all their blocks: a b c [d e f g h] and a b c [d e i j k] share a b c d.
    """
    first, *others = documents
    # Only clean blocks can be shared, and the last block that a view holds has no clean copy.
    length = min(packed.clean_length for packed in documents)
    for other in others:
        # Streams of other block sizes are other computations.
        length *= other.document.block_size == first.document.block_size
        length = min(length, common_length(first.document.embedding_inputs, other.document.embedding_inputs))
    length -= length % first.document.block_size
    return [first._replace(shared=0), *(other._replace(shared=length) for other in others)]


def total_cost(documents: Sequence[PackedDocument]) -> int:
    """Positions that documents take in a row together."""
    return sum(packed.cost for packed in documents)


def costs_by_length(
    size_E: np.ndarray,
    clean_E: np.ndarray,
    response_E: np.ndarray,
    common_U: np.ndarray,
    num_views: int,
    unit_size: int,
) -> np.ndarray:
    """What `total_cost(share(...))` of each unit will be, by lengths alone: int64 [U].

    A unit is `unit_size` consecutive documents of E in all: one, or the two sides of a pair. `size_E` is the block size of
    each document, `clean_E` the blocks of its clean stream, `response_E` those of each of its views, and `common_U` the
    tokens that the documents of a unit have in common. So a run's rows are known before any token is read.
    """
    cost_UM = (size_E * (clean_E + num_views * response_E)).reshape(-1, unit_size)  # M documents a unit
    clean_UM, size_UM = clean_E.reshape(-1, unit_size), size_E.reshape(-1, unit_size)
    # Block sizes differ only where a document is shorter than a block: it has no clean stream, and so nothing is shared.
    shared_U = np.minimum(common_U // size_UM[:, 0], clean_UM.min(axis=1))
    return cost_UM.sum(axis=1) - (unit_size - 1) * size_UM[:, 0] * shared_U
