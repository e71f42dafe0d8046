"""Direct preference optimisation with ELBOs in place of log-likelihoods (docs/method.md#dpo).

    score(y) = elbo_policy(y) - elbo_reference(y),    delta = score(chosen) - score(rejected)

    sigmoid   - (1 - s) log sigmoid(beta delta) - s log sigmoid(- beta delta)                    s = label_smoothing
    robust    (- (1 - s) log sigmoid(beta delta) + s log sigmoid(- beta delta)) / (1 - 2 s)
    hinge     max(0, 1 - beta delta)
    ipo       (delta - 1 / (2 beta))^2, where each score is divided by its real response tokens

The names and formulas are those of trl 1.16 (DPOTrainer), whose `sigmoid_norm` is sigmoid with `length_normalize` here: the
scores are divided by the real response tokens first. The fill after EOS is no part of a length.
Its `sigmoid` ignores label_smoothing; here that is conservative DPO's, as in its `aot`. Its `sft` term is `sft_loss_coef`
here: the negative ELBO of the chosen answers over the response tokens that it covers, fill included.

Documents 2i and 2i + 1 of a batch are the sides of a pair: they share their noise, and so do policy and reference, whose
ELBOs are the column `reference_elbo_D`. A pair counts 1, or its record's `weight`, in sums and counts; all counts are known
before the forward.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.elbo import elbo
from dfactory.algorithms.loss_weights import by_document
from dfactory.algorithms.metrics import token_metrics
from dfactory.algorithms.paired import Paired, PairedKeys
from dfactory.config.keys import key
from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class DPO(Objective):
    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    length_normalize: bool = False
    sft_loss_coef: float = 0.0

    def counts(self, batch: ViewBatch, scores: TokenScores | None = None) -> dict[str, Count]:
        weight_D = batch.columns.get("weight_D")
        pairs = float(len(batch.document_id_D) // 2) if weight_D is None else weight_D[0::2].sum()
        counts: dict[str, Count] = {"preference": pairs}
        if self.sft_loss_coef:
            counts["sft"] = by_document(batch, batch.response_length_D)[0::2].sum()
        return counts

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        elbo_D = elbo(batch, scores.logprob_N)
        score_D = elbo_D - batch.columns["reference_elbo_D"]
        counts = self.counts(batch)
        pair_D = self.preference(score_D, batch.answer_length_D).repeat_interleave(2)  # that of each of its sides
        loss = {"preference": Mean(by_document(batch, pair_D)[0::2].sum(), counts["preference"])}
        if self.sft_loss_coef:
            loss["sft"] = Mean(-by_document(batch, elbo_D)[0::2].sum(), counts["sft"])
        metrics = token_metrics(batch, scores) | self._pair_metrics(elbo_D.detach(), score_D.detach())
        return LossTerms(loss, metrics, weights={"sft": self.sft_loss_coef})

    def measure(self, batch: ViewBatch, scores: TokenScores) -> dict[str, Mean]:
        """What an evaluation reports: `loss` is the preference term alone, also where there is an SFT term."""
        terms = self(batch, scores)
        return terms.metrics | {"loss": terms.loss["preference"]}

    def preference(self, score_D: torch.Tensor, answer_length_D: torch.Tensor) -> torch.Tensor:
        """The loss of each pair."""
        if self.length_normalize or self.loss_type == "ipo":
            score_D = score_D / answer_length_D
        delta = score_D[0::2] - score_D[1::2]
        if self.loss_type == "ipo":
            return (delta - 1 / (2 * self.beta)) ** 2
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * delta)
        right, wrong, s = -F.logsigmoid(self.beta * delta), -F.logsigmoid(-self.beta * delta), self.label_smoothing
        if self.loss_type == "robust":
            return ((1 - s) * right - s * wrong) / (1 - 2 * s)
        return (1 - s) * right + s * wrong

    def _pair_metrics(self, elbo_D: torch.Tensor, score_D: torch.Tensor) -> dict[str, Mean]:
        """trl's, with ELBOs as logps; and how often the policy alone finds the chosen answer more likely. A tie counts half:
        a policy that still equals its reference is as good as a guess."""
        reward_D = self.beta * score_D
        chosen, rejected = reward_D[0::2], reward_D[1::2]
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": _wins(chosen, rejected),
            "logps/chosen": elbo_D[0::2],
            "logps/rejected": elbo_D[1::2],
            "logps/accuracies": _wins(elbo_D[0::2], elbo_D[1::2]),
        }
        return {name: Mean(value.sum(), len(value)) for name, value in values.items()}


def _wins(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """1 where `one` is the larger, 0 where it is the smaller, 1/2 where both are equal."""
    return ((one - other).sign() + 1) / 2


@dataclasses.dataclass
class DPOKeys(PairedKeys):
    loss_type: str = key(
        "sigmoid",
        "the loss of a pair's margin, as in trl; ipo divides ELBOs by the real response tokens",
        choices=("sigmoid", "robust", "hinge", "ipo"),
    )
    label_smoothing: float = key(
        0.0,
        "share of pairs that are taken to be labelled the wrong way round (sigmoid, robust)",
        low=0.0,
        high=0.5,
    )
    length_normalize: bool = key(False, "divide ELBOs by the real response tokens; trl's sigmoid_norm")
    sft_loss_coef: float = key(0.0, "weight of the chosen answers' negative ELBO per response token", low=0.0)


class DirectPreferenceOptimisation(Paired):
    name = "dpo"
    summary = "direct preference optimisation with ELBOs in place of log-likelihoods"
    source = "docs/method.md#dpo"
    weighs_records = True
    Keys = DPOKeys

    def problems(self, recipe) -> Iterator[str]:
        yield from super().problems(recipe)
        smoothing, loss = recipe.label_smoothing, recipe.loss_type
        if recipe.beta == 0:
            yield f"beta 0 with {self.selector}: the loss would not depend on the policy"
        if smoothing > 0 and loss not in ("sigmoid", "robust"):
            yield (
                f"label_smoothing {smoothing:g} with loss_type {loss} has no meaning: set it to 0, or use sigmoid or robust"
            )
        if smoothing == 0.5 and loss == "robust":
            yield "label_smoothing 0.5 with loss_type robust divides by zero: lower it"

    def objective(self, recipe, editing_mask_id: int | None) -> DPO:
        return DPO(recipe.beta, recipe.loss_type, recipe.label_smoothing, recipe.length_normalize, recipe.sft_loss_coef)


ALGORITHMS.add(DirectPreferenceOptimisation())
