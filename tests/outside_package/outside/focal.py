"""Focal supervised fine-tuning (arXiv:1708.02002): targets that the model already predicts count less.

L = - sum over targets of  (1 - p)^gamma log p  /  targets
"""

import dataclasses

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.metrics import token_metrics
from dfactory.algorithms.supervised import Supervised, SupervisedKeys
from dfactory.config.keys import key
from dfactory.types import LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class Focal(Objective):
    gamma: float

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, float]:
        return {"nll": float(batch.num_targets)}

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        weight_N = (1 - scores.logprob_N.detach().exp()) ** self.gamma
        total = -(weight_N * scores.logprob_N).sum()
        return LossTerms({"nll": Mean(total, self.counts(batch)["nll"])}, token_metrics(batch, scores))


@dataclasses.dataclass
class FocalKeys(SupervisedKeys):
    focal_gamma: float = key(2.0, "how much less what is already predicted counts; 0: as in plain fine-tuning", low=0.0)


class FocalFineTuning(Supervised):
    name = "focal"
    summary = "supervised fine-tuning that looks at what is not yet predicted"
    source = "arXiv:1708.02002"
    Keys = FocalKeys

    def objective(self, recipe, editing_mask_id: int | None) -> Focal:
        return Focal(recipe.focal_gamma)


ALGORITHMS.add(FocalFineTuning())
