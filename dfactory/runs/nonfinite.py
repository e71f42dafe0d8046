"""A NaN or Inf in a loss or a gradient: all ranks agree on it, no weight changes, and the run stops or counts.

All ranks know the norm of the whole gradient before weights change, and a loss that is not finite makes it NaN
(window.spread_nonfinite). So no extra message between ranks is needed: the optimiser skips such a step (Trainer._step),
and at the end of the step, where the host reads the norm anyway, every rank draws the same conclusion here.
"""

import json
import math
from typing import Any

import torch

from dfactory import distributed
from dfactory.errors import NonFiniteError
from dfactory.runs.folder import RunFolder, replace_text, writing
from dfactory.types import TrainState, ViewBatch


class NonFiniteGuard:
    """Counts skipped steps, on all ranks. A run may skip up to `allowed` steps; one more ends it."""

    def __init__(self, folder: RunFolder, allowed: int, rank: int, world_size: int):
        self.folder, self.allowed, self.rank, self.world_size = folder, allowed, rank, world_size

    def check(
        self, state: TrainState, window: list[ViewBatch], losses: list[torch.Tensor], grad_norm: float
    ) -> dict[str, int]:
        """What to log for the step that was just finished. `losses` are those of this rank's micro-batches.

        Every skipped step leaves a dump in the run folder, written by the ranks whose loss was not finite. If every loss was
        finite all ranks write one, because a gradient that was summed over ranks does not show where it came from. Raises
        NonFiniteError on all ranks at the first step beyond what is allowed.
        """
        if not math.isfinite(grad_norm):
            state.skipped_steps += 1
            values = [loss.item() for loss in losses]
            ranks = distributed.ranks_with(not all(map(math.isfinite, values)))
            if self.rank in ranks or not ranks:
                self._dump(state.step, window, values, grad_norm)
            distributed.any_rank(False)  # a barrier: a rank that ends may end the others before they have written
            if state.skipped_steps > self.allowed:
                raise NonFiniteError(self._message(state, ranks))
        return {"skipped_steps": state.skipped_steps}

    def _dump(self, step: int, window: list[ViewBatch], losses: list[float], grad_norm: float) -> None:
        found = {
            "step": step,
            "rank": self.rank,
            "ranks": self.world_size,
            "grad_norm": str(grad_norm),
            "micro_batches": [
                {"loss": loss if math.isfinite(loss) else str(loss), "documents": _documents(batch)}
                for loss, batch in zip(losses, window, strict=True)
            ],
        }
        with writing(self.folder.nonfinite):
            self.folder.nonfinite.mkdir(parents=True, exist_ok=True)
            file = self.folder.nonfinite / f"step-{step}-rank-{self.rank}.json"
            replace_text(file, json.dumps(found, indent=1) + "\n")

    def _message(self, state: TrainState, ranks: list[int]) -> str:
        what = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "the gradient, with every loss finite,"
        return (
            f"step {state.step}: {what} is NaN or infinite; the weights are those of step {state.step - 1}, and "
            f"{state.skipped_steps} steps were skipped, skip_nonfinite allows {self.allowed}. "
            f"{self.folder.nonfinite} names the documents, t and losses: look at these records, lower learning_rate, and "
            "resume from the last checkpoint, or raise skip_nonfinite to skip such steps"
        )


def _documents(batch: ViewBatch) -> list[dict[str, Any]]:
    """The documents of a micro-batch, each with the mask ratios of its targets, by view."""
    t_by_view: dict[int, dict[int, set[float]]] = {number: {} for number in range(len(batch.document_id_D))}
    for document, view, t in zip(batch.document_N.tolist(), batch.view_N.tolist(), batch.t_N.tolist(), strict=True):
        t_by_view[document].setdefault(view, set()).add(round(t, 6))
    return [
        {"document_id": name, "t": {f"view {view}": sorted(t) for view, t in sorted(t_by_view[number].items())}}
        for number, name in enumerate(batch.document_id_D.tolist())
    ]
