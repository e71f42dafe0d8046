"""Confidence-aware parallel training: be sure where you are right (METHOD section 5, [L20] 5.2, [DP]).

    L = L_SFT + beta * L_conf,    L_conf = sum over correct targets of the entropy of p / number of correct targets

A target is correct when argmax p is the token that it stands for. Which ones are is a constant: no gradient runs through
it. The denominator is the number of correct targets of the whole window over all ranks, so a split into micro-batches
does not change the loss; with none, L_conf is 0.
"""

import dataclasses

from dfactory.objectives.sft import SFT
from dfactory.types import LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class CAP(Objective):
    loss_weight: str = "uniform"
    confidence_beta: float = 2.0
    editing_mask_id: int | None = None  # as in SFT
    counts_need_scores = True

    def counts(self, batch: ViewBatch, scores: TokenScores) -> dict[str, float]:
        return SFT(self.loss_weight).counts(batch) | {"confidence": float(scores.hit_N.sum())}

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        terms = SFT(self.loss_weight, self.editing_mask_id)(batch, scores)
        entropy = (scores.entropy_N * scores.hit_N).sum()
        count = self.counts(batch, scores)["confidence"]
        confidence = Mean(self.confidence_beta * entropy, count)
        metrics = terms.metrics | {"entropy_of_hits": Mean(entropy.detach(), count)}
        return LossTerms(loss=terms.loss | {"confidence": confidence}, metrics=metrics)
