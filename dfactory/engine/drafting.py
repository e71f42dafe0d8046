"""A source that writes the model's own predictions into the batches of another one (docs/method.md#token-editing)."""

from collections.abc import Callable, Sequence

from dfactory.engine.window import MappedSource, Source
from dfactory.types import TokenScores, ViewBatch

Rewrite = Callable[[ViewBatch, TokenScores], ViewBatch]
"""A batch and the model's scores of it -> the batch with drafts in its views."""


class DraftSource(MappedSource):
    """Each batch of `source`, rewritten once by each of `rewrites`, every time with fresh scores without gradient.

    The drafts come from the model as it is when the batch is taken, so the cursor holds nothing about them.
    """

    def __init__(self, source: Source, score: Callable[[ViewBatch], TokenScores], rewrites: Sequence[Rewrite]):
        super().__init__(source, self._rewritten)
        self.score, self.rewrites = score, rewrites

    def _rewritten(self, batch: ViewBatch) -> ViewBatch:
        for rewrite in self.rewrites:
            scores = self.score(batch)
            batch = rewrite(batch.to(scores.argmax_N.device), scores)
        return batch
