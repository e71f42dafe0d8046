"""A source that writes the model's own predictions into the batches of another one (docs/method.md#token-editing)."""

from collections.abc import Callable, Sequence

from dfactory.engine.window import MappedSource, Source
from dfactory.types import TokenScores, ViewBatch

Rewrite = Callable[[ViewBatch, TokenScores], ViewBatch]
"""A batch and what the model says of it -> the batch with drafts in it."""


class DraftSource(MappedSource):
    """Each window of `source`, rewritten once for each of `rewrites`, every time by fresh scores without gradient.

    The drafts are those of the model as it is when the window is taken; a cursor has nothing to remember of them.
    """

    def __init__(self, source: Source, score: Callable[[ViewBatch], TokenScores], rewrites: Sequence[Rewrite]):
        super().__init__(source, self._rewritten)
        self.score, self.rewrites = score, rewrites

    def _rewritten(self, batch: ViewBatch) -> ViewBatch:
        for rewrite in self.rewrites:
            scores = self.score(batch)
            batch = rewrite(batch.to(scores.argmax_N.device), scores)
        return batch
