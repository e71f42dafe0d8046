"""Supervised fine-tuning: the weighted negative log-likelihood of the targets (docs/method.md#sft).

    L = - sum over views, targets i of  w_i log p(x0_i | view)  /  Z

`loss_weight` chooses w and Z (loss_weights.py); the `weight` of a record multiplies its targets' w and its share of Z. With
causal context, `context_loss_weight` times the mean negative log-likelihood of every clean token given those before it is
added.
"""

import dataclasses

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.loss_weights import LOSS_WEIGHTS, by_target
from dfactory.algorithms.metrics import metrics_by_kind, token_metrics
from dfactory.algorithms.supervised import CART_P, Supervised
from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class SFT(Objective):
    loss_weight: str = "uniform"
    editing_mask_id: int | None = None  # with token editing: log masked, edited and kept targets apart
    cart_p: float = CART_P
    context_loss_weight: float = 0.0  # of the clean stream's own targets, where it has any

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, Count]:
        """This micro-batch's share of Z, from the batch alone."""
        if self.context_loss_weight:
            noised_N = batch.view_N > 0
            kinds = {"nll": noised_N, "context_nll": ~noised_N}
            return {name: by_target(batch, here_N).sum() for name, here_N in kinds.items()}
        return {"nll": LOSS_WEIGHTS[self.loss_weight].count(batch)}

    def is_linear(self, batch: ViewBatch) -> bool:
        return True

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        weight_N = by_target(batch, LOSS_WEIGHTS[self.loss_weight].weigh(batch, self.cart_p))
        weighted_N = weight_N * -scores.logprob_N
        metrics = token_metrics(batch, scores)
        if self.editing_mask_id is not None:
            metrics |= metrics_by_kind(batch, scores, self.editing_mask_id)
        counts = self.counts(batch)
        if not self.context_loss_weight:
            return LossTerms(loss={"nll": Mean(weighted_N.sum(), counts["nll"])}, metrics=metrics)
        noised_N = batch.view_N > 0
        parts = {"nll": weighted_N * noised_N, "context_nll": weighted_N * ~noised_N}
        loss = {name: Mean(part_N.sum(), counts[name]) for name, part_N in parts.items()}
        return LossTerms(loss=loss, metrics=metrics, weights={"context_nll": self.context_loss_weight})


class SupervisedFineTuning(Supervised):
    name = "sft"
    summary = "supervised fine-tuning: the negative log-likelihood of responses"
    source = "docs/method.md#sft"
    default_of = "stage"
    weighs_records = True

    def objective(self, recipe, editing_mask_id: int | None) -> SFT:
        return SFT(recipe.loss_weight, editing_mask_id, recipe.cart_p, recipe.context_loss_weight)


ALGORITHMS.add(SupervisedFineTuning())
