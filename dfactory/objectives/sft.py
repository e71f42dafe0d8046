"""Supervised fine-tuning: the weighted negative log-likelihood of the targets (docs/method.md#sft).

    L = - sum over views, targets i of  w_i log p(x0_i | view)  /  Z

`uniform`: w = 1, Z the number of targets; what public fine-tuning code of this family computes.
`elbo`: w = 1/t, Z the number of response tokens, counted once a view (equation 5 of LLaDA2.0).
"""

import dataclasses

import torch

from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class SFT(Objective):
    loss_weight: str = "uniform"
    editing_mask_id: int | None = None  # with token editing: log masked, edited and kept targets apart

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, Count]:
        """This micro-batch's share of Z, from the batch alone."""
        if self.loss_weight == "elbo":
            return {"nll": (batch.response_length_D * batch.num_views_D).sum()}
        return {"nll": float(batch.num_targets)}

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        nll_N = -scores.logprob_N
        weighted = batch.elbo_weight_N * nll_N if self.loss_weight == "elbo" else nll_N
        metrics = token_metrics(batch, scores)
        if self.editing_mask_id is not None:
            metrics |= metrics_by_kind(batch, scores, self.editing_mask_id)
        return LossTerms(loss={"nll": Mean(weighted.sum(), self.counts(batch)["nll"])}, metrics=metrics)


def token_metrics(batch: ViewBatch, scores: TokenScores) -> dict[str, Mean]:
    """Means over the real targets, which every objective logs. The fill is easy, and its share grows with the block size."""
    count = batch.real_N.sum()
    return {
        "token_nll": Mean(-torch.where(batch.real_N, scores.logprob_N.detach(), 0.0).sum(), count),
        "hit_rate": Mean((scores.hit_N * batch.real_N).sum(), count),
        "entropy": Mean(torch.where(batch.real_N, scores.entropy_N.detach(), 0.0).sum(), count),
    }


def metrics_by_kind(batch: ViewBatch, scores: TokenScores, mask_id: int) -> dict[str, Mean]:
    """NLL and hit rate of masked, edited and kept real targets: those where [M], a wrong token or the right one stands."""
    masked_N, kept_N = batch.input_N == mask_id, batch.input_N == batch.target_ids_N
    metrics = {}
    for kind, kind_N in {"masked": masked_N, "edited": ~masked_N & ~kept_N, "kept": kept_N}.items():
        here_N = kind_N & batch.real_N
        metrics[f"token_nll_{kind}"] = Mean(-(scores.logprob_N.detach() * here_N).sum(), here_N.sum())
        metrics[f"hit_rate_{kind}"] = Mean((scores.hit_N & here_N).sum(), here_N.sum())
    return metrics
