"""A window whose loss joins scores of several micro-batches, trained on without holding their graphs.

Formulas: docs/method.md#two-passes.

Pass 1, without gradient: the log-probability of every target of the window, and with them, for each loss term S,
c_i = dS / d log p_i. Pass 2, micro-batch by micro-batch: backpropagate sum_i c_i log p_i. By the chain rule that is the
gradient of S itself, exactly, as long as both passes compute the same log-probabilities: `replay_gap` tells by how much
they differ, in nats a target.
"""

import dataclasses

import torch

from dfactory.types import PADDING, Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class Replayed(Objective):
    """Pass 2: an objective that is linear in the log-probabilities. It needs the columns that `replay` attaches."""

    terms: LossTerms  # of pass 1, over this rank's whole window
    num_micro_batches: int

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, Count]:
        return {name: float(mean.count) / self.num_micro_batches for name, mean in self.terms.loss.items()}

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        """The total of a term is what pass 1 found; its gradient is that of the linear form."""
        counts, loss = self.counts(batch), {}
        for name, mean in self.terms.loss.items():
            linear = (batch.columns[f"coefficient_{name}_N"] * scores.logprob_N).sum()
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
    """From pass 1's scores to the objective and the micro-batches of pass 2."""
    leaf_N = torch.cat([score.logprob_N for score in scores]).detach().requires_grad_()
    others = (torch.cat([score[field] for score in scores]) for field in range(1, len(TokenScores._fields)))
    terms = objective(join(window), TokenScores(leaf_N, *others))
    sizes = [batch.num_targets for batch in window]
    columns = [{"first_logprob_N": score.logprob_N} for score in scores]
    for name, mean in terms.loss.items():
        gradient_N = torch.autograd.grad(mean.total, leaf_N, retain_graph=True)[0]
        for column, part_N in zip(columns, gradient_N.split(sizes), strict=True):
            column[f"coefficient_{name}_N"] = part_N
    replayed = [batch.with_columns(**column) for batch, column in zip(window, columns, strict=True)]
    return Replayed(terms, len(window)), replayed


def join(window: list[ViewBatch]) -> ViewBatch:
    """Micro-batches as one of a single row: documents are numbered on, targets point into the longer row."""
    places, index_N, documents, positions = [], [], 0, 0
    total = sum(len(batch.document_id_D) for batch in window)
    for batch in window:
        here = torch.stack([batch.document_RS, batch.trunk_RS]).flatten(1)
        count = len(batch.document_id_D)
        on = documents + torch.where(here < count, 0, total - count)  # trunks are numbered behind all documents
        places.append(torch.where(here == PADDING, PADDING, here + on))
        index_N.append(batch.target_index_N + positions)
        documents += count
        positions += here.shape[1]
    document_RS, trunk_RS = torch.cat(places, dim=1)[:, None]
    joined = {"document_RS": document_RS, "trunk_RS": trunk_RS, "target_index_N": torch.cat(index_N)}
    for field in dataclasses.fields(ViewBatch):
        if field.name.endswith("_RS") and field.name not in joined:
            joined[field.name] = torch.cat([getattr(batch, field.name).flatten() for batch in window])[None]
        elif field.name.endswith(("_N", "_D")) and field.name not in joined:
            joined[field.name] = torch.cat([getattr(batch, field.name) for batch in window])
    columns = {name: torch.cat([batch.columns[name] for batch in window]) for name in window[0].columns}
    return ViewBatch(**joined, columns=columns)
