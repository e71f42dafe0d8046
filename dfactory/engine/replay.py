"""Two passes over a global batch whose loss joins scores of several micro-batches, without holding all their graphs.

Formulas: docs/method.md#two-passes.

Pass 1, without gradient, computes the log-probability of every target of the global batch, and from them, for each loss
term S, c_i = dS / d log p_i. Pass 2 backpropagates sum_i c_i log p_i, one micro-batch at a time. By the chain rule that is
exactly the gradient of S, as long as both passes compute the same log-probabilities. The metric `replay_gap` is their
difference, in nats per target.
"""

import dataclasses

import torch

from dfactory.types import PADDING, Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class Replayed(Objective):
    """Pass 2: an objective that is linear in the log-probabilities. It needs the columns that `replay` attaches."""

    terms: LossTerms  # of pass 1, over all micro-batches of this rank
    num_micro_batches: int

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, Count]:
        return {name: float(mean.count) / self.num_micro_batches for name, mean in self.terms.loss.items()}

    def is_linear(self, batch: ViewBatch) -> bool:
        return True

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        """Loss terms with the value of pass 1 and the gradient of the linear form."""
        counts, loss = self.counts(batch), {}
        for name, mean in self.terms.loss.items():
            linear = (batch.columns[f"coefficient_{name}_N"] * scores.logprob_N).sum()
            # value: pass 1's total, shared out over the micro-batches; gradient: that of `linear`
            total = linear + (mean.total.detach() / self.num_micro_batches - linear.detach())
            loss[name] = Mean(total, counts[name])
        share = 1 / self.num_micro_batches
        metrics = {name: Mean(m.total * share, m.count * share) for name, m in self.terms.metrics.items()}
        gap_N = scores.logprob_N.detach() - batch.columns["first_logprob_N"]
        metrics["replay_gap"] = Mean(gap_N.abs().sum(), batch.num_targets)
        return LossTerms(loss, metrics, self.terms.weights)


def replay(
    objective: Objective, window: list[ViewBatch], scores: list[TokenScores]
) -> tuple[Replayed, list[ViewBatch]]:
    """The objective and the micro-batches of pass 2, from the scores of pass 1."""
    # All targets of all micro-batches as one leaf [N]: the objective's gradient stops here and never enters a model.
    leaf_N = torch.cat([score.logprob_N for score in scores]).detach().requires_grad_()
    others = (torch.cat([score[field] for score in scores]) for field in range(1, len(TokenScores._fields)))
    terms = objective(join(window), TokenScores(leaf_N, *others))
    sizes = [batch.num_targets for batch in window]
    columns = [{"first_logprob_N": score.logprob_N} for score in scores]
    for name, mean in terms.loss.items():
        gradient_N = torch.autograd.grad(mean.total, leaf_N, retain_graph=True)[0]  # c_i; the terms share one graph
        for column, part_N in zip(columns, gradient_N.split(sizes), strict=True):
            column[f"coefficient_{name}_N"] = part_N
    replayed = [batch.with_columns(**column) for batch, column in zip(window, columns, strict=True)]
    return Replayed(terms, len(window)), replayed


def join(window: list[ViewBatch]) -> ViewBatch:
    """Micro-batches joined into one batch with R = 1: documents are renumbered, targets point into the longer sequence.

    Documents of the result have the numbers 0..total-1, in order. Shared prefixes, which every batch numbers from its own
    document count on, come after all documents.
    """
    places, documents, positions = [], 0, 0
    indices: dict[str, list[torch.Tensor]] = {"target_index_N": [], "left_index_N": [], "clean_left_index_N": []}
    total = sum(len(batch.document_id_D) for batch in window)
    for batch in window:
        here = torch.stack([batch.document_RS, batch.trunk_RS]).flatten(1)  # [2, R * S]
        count = len(batch.document_id_D)
        on = documents + torch.where(here < count, 0, total - count)  # shared prefixes move to after all documents
        places.append(torch.where(here == PADDING, PADDING, here + on))
        for name, parts in indices.items():
            parts.append(getattr(batch, name) + positions)
        documents += count
        positions += here.shape[1]
    document_RS, trunk_RS = torch.cat(places, dim=1)[:, None]
    joined = {"document_RS": document_RS, "trunk_RS": trunk_RS}
    joined |= {name: torch.cat(parts) for name, parts in indices.items()}
    for field in dataclasses.fields(ViewBatch):
        if field.name not in (*joined, "columns"):
            joined[field.name] = _joined(field.name, [getattr(batch, field.name) for batch in window])
    columns = {name: _joined(name, [batch.columns[name] for batch in window]) for name in window[0].columns}
    return ViewBatch(**joined).with_columns(**columns)


def _joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Micro-batches' tensors of one name as that of their join; the end of the name says what there is one of."""
    if name.endswith("_RS"):
        return torch.cat([part.flatten() for part in parts])[None]  # R rows of S positions -> one row of R * S
    if name.endswith("_1"):
        return parts[0]  # one number for the step, the same in all micro-batches
    return torch.cat(parts)  # targets and documents, in order
