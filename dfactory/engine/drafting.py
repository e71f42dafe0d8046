"""A source that writes the model's own predictions into the batches of another one (token editing, METHOD section 3)."""

from collections.abc import Callable, Sequence
from typing import Any

from dfactory.engine.window import Source
from dfactory.types import TokenScores, ViewBatch

Rewrite = Callable[[ViewBatch, TokenScores], ViewBatch]
"""A batch and what the model says of it -> the batch with drafts in it."""


class DraftSource:
    """Each window of `source`, rewritten once for each of `rewrites`, every time by fresh scores without gradient.

    The drafts are those of the model as it is when the window is taken; a cursor has nothing to remember of them.
    """

    def __init__(self, source: Source, score: Callable[[ViewBatch], TokenScores], rewrites: Sequence[Rewrite]):
        self.source, self.score, self.rewrites = source, score, rewrites

    def next_window(self) -> list[ViewBatch] | None:
        window = self.source.next_window()
        return None if window is None else [self._rewritten(batch) for batch in window]

    def _rewritten(self, batch: ViewBatch) -> ViewBatch:
        for rewrite in self.rewrites:
            scores = self.score(batch)
            batch = rewrite(batch.to(scores.argmax_N.device), scores)
        return batch

    @property
    def epoch(self) -> float:
        return self.source.epoch

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)
