"""Supervised fine-tuning: the weighted negative log-likelihood of the targets (docs/method.md#sft).

    L = - sum over views, targets i of  w_i log p(x0_i | view)  /  Z

`uniform`: w = 1, Z the number of targets; what public fine-tuning code of LLaDA2 computes.
`elbo`: w = 1/t, Z the number of response tokens, counted once a view (equation 5 of LLaDA2.0).
loss_weights.py has these and those of other projects.
"""

import dataclasses

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.loss_weights import LOSS_WEIGHTS
from dfactory.algorithms.metrics import metrics_by_kind, token_metrics
from dfactory.algorithms.supervised import CART_P, Supervised
from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class SFT(Objective):
    loss_weight: str = "uniform"
    editing_mask_id: int | None = None  # with token editing: log masked, edited and kept targets apart
    cart_p: float = CART_P

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, Count]:
        """This micro-batch's share of Z, from the batch alone."""
        return {"nll": LOSS_WEIGHTS[self.loss_weight].count(batch)}

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        weighted_N = LOSS_WEIGHTS[self.loss_weight].weigh(batch, self.cart_p) * -scores.logprob_N
        metrics = token_metrics(batch, scores)
        if self.editing_mask_id is not None:
            metrics |= metrics_by_kind(batch, scores, self.editing_mask_id)
        return LossTerms(loss={"nll": Mean(weighted_N.sum(), self.counts(batch)["nll"])}, metrics=metrics)


class SupervisedFineTuning(Supervised):
    name = "sft"
    summary = "supervised fine-tuning: the negative log-likelihood of responses"
    source = "docs/method.md#sft"
    default_of = "stage"

    def objective(self, recipe, editing_mask_id: int | None) -> SFT:
        return SFT(recipe.loss_weight, editing_mask_id, recipe.cart_p)


ALGORITHMS.add(SupervisedFineTuning())
