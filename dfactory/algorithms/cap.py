"""Confidence-aware parallel training: be sure where you are right (docs/method.md#cap).

    L = L_SFT + beta * L_conf,    L_conf = sum over correct targets of their entropy / number of correct targets

A target is correct when argmax p is the token that it stands for. Which ones are is a constant: no gradient runs through
it. A target counts as often as its record's `weight` says, in sum and number. Entropy is that of
softmax(logits / entropy_temperature), which the head computes; LLaDA2.0 has 1, dParallel 0.5.

The denominator is the number of correct targets of the whole global batch, so a split into micro-batches does
not change the loss; with none, L_conf is 0. It has to be known before the first backward. With one micro-batch a rank,
the forward that is trained on gives it; with several, a forward without gradient and without dropout comes first.
"""

import dataclasses

import torch

from dfactory.algorithms.base import ALGORITHMS, Needs
from dfactory.algorithms.loss_weights import by_target
from dfactory.algorithms.sft import SFT
from dfactory.algorithms.supervised import CART_P, Supervised, SupervisedKeys
from dfactory.config.keys import key
from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class CAP(Objective):
    loss_weight: str = "uniform"
    confidence_beta: float = 2.0
    editing_mask_id: int | None = None  # as in SFT
    cart_p: float = CART_P
    context_loss_weight: float = 0.0  # as in SFT
    counts_need_scores = True

    def counts(self, batch: ViewBatch, scores: TokenScores) -> dict[str, Count]:
        return self._sft.counts(batch) | {"confidence": self._right(batch, scores).sum()}

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        terms, right_N = self._sft(batch, scores), self._right(batch, scores)
        confidence = Mean((scores.entropy_N * right_N).sum(), right_N.sum())
        return LossTerms(
            loss={**terms.loss, "confidence": confidence},
            metrics=terms.metrics,
            weights={**terms.weights, "confidence": self.confidence_beta},
        )

    @property
    def _sft(self) -> SFT:
        return SFT(self.loss_weight, self.editing_mask_id, self.cart_p, self.context_loss_weight)

    def _right(self, batch: ViewBatch, scores: TokenScores) -> torch.Tensor:
        """What each target counts whose prediction is right already, in a view: 1, or its record's weight; 0 elsewhere."""
        right_N = scores.hit_N & (batch.view_N > 0) if self.context_loss_weight else scores.hit_N
        return by_target(batch, right_N)


@dataclasses.dataclass
class CAPKeys(SupervisedKeys):
    confidence_beta: float = key(2.0, "weight of the entropy where the prediction is already right", low=0.0)
    entropy_temperature: float = key(1.0, "take that entropy of softmax(logits / this); 0.5 is dParallel's", low=0.01)


class ConfidenceAwareParallel(Supervised):
    name = "cap"
    summary = "supervised fine-tuning that also sharpens what is already right, for fewer forwards a response"
    source = "docs/method.md#cap"
    weighs_records = True
    Keys = CAPKeys

    def needs(self, recipe) -> Needs:
        return Needs(entropy_temperature=recipe.entropy_temperature)

    def objective(self, recipe, editing_mask_id: int | None) -> CAP:
        return CAP(
            recipe.loss_weight, recipe.confidence_beta, editing_mask_id, recipe.cart_p, recipe.context_loss_weight
        )


ALGORITHMS.add(ConfidenceAwareParallel())
