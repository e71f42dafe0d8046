"""Documents with their views, and the clean stream that documents of one beginning share in a row."""

from collections.abc import Sequence
from typing import NamedTuple

from dfactory.types import AlignedDocument, View, common_length


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
