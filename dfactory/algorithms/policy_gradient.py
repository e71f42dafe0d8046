"""Clipped policy gradient over the views of rollouts (docs/method.md#policy-gradients).

With A the advantage of a rollout and w the weight of a target's view,

    log rho_u = sum over the targets of unit u of  w (log p - log p_old),   divided by the unit's normaliser
    J         = sum over units of  min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)

A unit is a token (TraceRL, CJ-GRPO, diffu-GRPO: w multiplies its term instead of its log-ratio), or a sequence (EBPO, ESPO:
w estimates the ELBO). The normaliser of a sequence is 1 (`sum`), its real tokens (`mean`) or its response blocks
(`block`); epsilon has to be meant for it. `clip: unconditional` weighs with the clipped ratio whatever the sign of A, as
a constant, and divides by the sum of the weights (StableDRL); those of tokens are multiplied by w, and by 1 / length with
aggregation grpo, there too.

    L = -J / Z + kl_coef * KL / tokens,   Z = rollouts (sequences; tokens divided by their rollout's length: grpo),
                                              tokens (dapo), or rollouts * max_new_tokens (dr_grpo)

A rollout may lie in several rows, each with a part of its views; a token's unit is then whole in one of them, a
sequence's is not: the caller replays it in two passes (see engine/replay.py).

Columns of the batch: `advantage_D`, `rollout_D` (its number in the window), `share_D` (1 over the rows that its views lie
in), and `reference_logprob_N` where kl_coef is not 0. Three may be left out: `old_logprob_N`, where no step lies between:
then it is the log-probability itself, as a constant; `fresh_N`, where the ratio has to be 1 at the first step; and
`recorded_logprob_N`, the decoder's. With that one each token of `importance_cap` has the constant weight
min(importance_cap, old / recorded) (see rl/source.py).
"""

import dataclasses
from typing import Any, Optional

import torch

from dfactory.algorithms.base import Needs
from dfactory.algorithms.metrics import token_metrics
from dfactory.algorithms.rollouts import RolloutAlgorithm, RolloutKeys
from dfactory.algorithms.units import by_unit, sum_by_unit
from dfactory.config.keys import key
from dfactory.types import Count, LossTerms, Mean, Objective, TokenScores, ViewBatch


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Objective):
    level: str = "token"  # token | sequence
    normaliser: str = "mean"  # of a sequence's log-ratio: sum | mean | block
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    clip: str = "ppo"  # ppo | unconditional
    aggregation: str = "grpo"  # of tokens: grpo | dapo | dr_grpo
    max_new_tokens: int = 1  # the constant of dr_grpo
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    importance_cap: float | None = None  # None: no importance weights

    @property
    def counts_need_scores(self) -> bool:
        return self.clip == "unconditional"

    @property
    def spans_micro_batches(self) -> bool:
        return self.level == "sequence"

    def counts(self, batch: ViewBatch, scores: TokenScores | None) -> dict[str, Count]:
        rollouts = batch.columns["share_D"].sum()
        tokens = (batch.columns["share_D"] * batch.answer_length_D).sum()
        if self.clip == "unconditional":
            weight_U = self._clipped_weight(self._log_ratio(batch, scores))
            policy = (weight_U * self._unit_weight(batch, scores)).sum()
        elif self.level == "sequence" or self.aggregation == "grpo":
            policy = rollouts
        else:
            policy = tokens if self.aggregation == "dapo" else rollouts * self.max_new_tokens
        return {"policy": policy} | ({"kl": tokens} if self.kl_coef else {})

    def is_linear(self, batch: ViewBatch) -> bool:
        """At a ratio of 1, where nothing else depends on the log-probabilities."""
        weighs = self.importance_cap is not None and "recorded_logprob_N" in batch.columns
        return "old_logprob_N" not in batch.columns and not weighs and not self.kl_coef

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms:
        counts = self.counts(batch, scores)
        log_ratio_U = self._log_ratio(batch, scores)
        ratio_U, advantage_U = log_ratio_U.exp(), self._advantage(batch)
        if self.clip == "unconditional":
            gain_U = self._clipped_weight(log_ratio_U) * advantage_U * log_ratio_U
            outside_U = (ratio_U > 1 + self.epsilon_high) | (ratio_U < 1 - self.epsilon)
        else:
            clipped_U = ratio_U.clamp(1 - self.epsilon, 1 + self.epsilon_high)
            gain_U = torch.minimum(ratio_U * advantage_U, clipped_U * advantage_U)
            outside_U = gain_U < ratio_U * advantage_U
        loss = {"policy": Mean(-(gain_U * self._unit_weight(batch, scores)).sum(), counts["policy"])}
        metrics = token_metrics(batch, scores)
        metrics["clip_ratio"] = Mean(outside_U.sum(), len(log_ratio_U))
        metrics["ratio_spread"] = Mean(log_ratio_U.detach().abs().sum(), len(log_ratio_U))
        moved_N = scores.logprob_N.detach() - self._old_logprob(batch, scores)
        metrics["logprob_change"] = Mean(moved_N.abs().sum(), batch.num_targets)
        metrics |= self._source_metrics(batch, scores, moved_N)
        if not self.kl_coef:
            return LossTerms(loss, metrics)
        loss["kl"] = Mean(self._kl(batch, scores), counts["kl"])
        return LossTerms(loss, metrics, weights={"kl": self.kl_coef})

    def _source_metrics(self, batch: ViewBatch, scores: TokenScores, moved_N: torch.Tensor) -> dict[str, Mean]:
        """Of the columns that the batch may have."""
        metrics = {}
        if (fresh_N := batch.columns.get("fresh_N")) is not None:
            metrics["logprob_change_fresh"] = Mean((moved_N.abs() * fresh_N).sum(), fresh_N.sum())
        if (importance_N := self._importance(batch, scores)) is not None:
            metrics["importance_gap"] = Mean((importance_N - 1).abs().sum(), batch.num_targets)
        return metrics

    def _log_ratio(self, batch: ViewBatch, scores: TokenScores) -> torch.Tensor:
        delta_N = scores.logprob_N - self._old_logprob(batch, scores)
        if self.level == "token":
            return delta_N
        return sum_by_unit(batch, batch.elbo_weight_N * delta_N) / by_unit(batch, self._normaliser_D(batch))

    def _old_logprob(self, batch: ViewBatch, scores: TokenScores) -> torch.Tensor:
        """[N], a constant."""
        old_N = batch.columns.get("old_logprob_N")
        return scores.logprob_N.detach() if old_N is None else old_N

    def _importance(self, batch: ViewBatch, scores: TokenScores) -> torch.Tensor | None:
        """The constant weight of each token for decoding from another distribution, [N]; None: 1."""
        recorded_N = batch.columns.get("recorded_logprob_N")
        if recorded_N is None or self.importance_cap is None:
            return None
        return (self._old_logprob(batch, scores) - recorded_N).exp().clamp(max=self.importance_cap)

    def _normaliser_D(self, batch: ViewBatch) -> torch.Tensor:
        if self.normaliser == "sum":
            return torch.ones_like(batch.columns["share_D"])
        if self.normaliser == "mean":
            return batch.answer_length_D.float()
        return batch.columns["response_blocks_D"].float()

    def _advantage(self, batch: ViewBatch) -> torch.Tensor:
        if self.level == "token":
            return batch.columns["advantage_D"][batch.document_N]
        return by_unit(batch, batch.columns["advantage_D"])

    def _unit_weight(self, batch: ViewBatch, scores: TokenScores) -> torch.Tensor | float:
        """What multiplies a unit's gain: for a token the weights of its view and of importance; a sequence's ratio has that
        of its views already."""
        if self.level == "sequence":
            return 1.0
        weight_N = batch.elbo_weight_N
        if (importance_N := self._importance(batch, scores)) is not None:
            weight_N = weight_N * importance_N
        if self.aggregation != "grpo":
            return weight_N
        return weight_N / batch.answer_length_D[batch.document_N]

    def _clipped_weight(self, log_ratio_U: torch.Tensor) -> torch.Tensor:
        return log_ratio_U.detach().exp().clamp(1 - self.epsilon, 1 + self.epsilon_high)

    def _kl(self, batch: ViewBatch, scores: TokenScores) -> torch.Tensor:
        """Summed over targets. k2 = d^2 / 2, k3 = e^d - d - 1, with d = log p_ref - log p."""
        d_N = batch.columns["reference_logprob_N"] - scores.logprob_N
        kl_N = d_N.square() / 2 if self.kl_estimator == "k2" else d_N.exp() - d_N - 1
        return (batch.elbo_weight_N * kl_N).sum()


@dataclasses.dataclass
class ClippedKeys(RolloutKeys):
    epsilon: float = key(0.2, "the ratio is clipped below at 1 - epsilon", low=0.0)
    epsilon_high: Optional[float] = key(None, "and above at 1 + epsilon_high; null: epsilon", low=0.0)
    ratio_clip: str = key(
        "ppo",
        "the smaller of clipped and plain gain (ppo), or clipped ratios as self-normalised constant weights whatever the "
        "advantage's sign (unconditional)",
        choices=("ppo", "unconditional"),
    )
    kl_coef: float = key(
        0.0, "weight of the KL term to the reference, which is the model at the start; 0: none", low=0.0
    )
    kl_estimator: str = key("k3", "k2 or k3; k3 explodes on ELBO differences", choices=("k2", "k3"))
    old_policy: str = key(
        "decoder",
        "the ratio's denominator: the policy that decoded, or the learner's at the first step on the rollouts, however old "
        "they are",
        choices=("decoder", "learner"),
    )


@dataclasses.dataclass
class TokenLevelKeys(ClippedKeys):
    loss_aggregation: str = key(
        "grpo",
        "mean by response, then over responses (grpo); over tokens (dapo); over a constant (dr_grpo)",
        choices=("grpo", "dapo", "dr_grpo"),
    )


class ClippedPolicyGradient(RolloutAlgorithm):
    """The parent of algorithms with a clipped ratio, of a token or of a sequence."""

    Keys = ClippedKeys

    def needs(self, recipe: Any) -> Needs:
        return Needs(reference=recipe.kl_coef > 0, old_logprob=True, takes_ratio_1=True)

    def unit(self, recipe: Any) -> dict[str, Any]:
        """What has a ratio of its own, as the fields of PolicyGradient."""
        raise NotImplementedError

    def objective(self, recipe: Any, editing_mask_id: int | None) -> PolicyGradient:
        return PolicyGradient(
            **self.unit(recipe),
            epsilon=recipe.epsilon,
            epsilon_high=highest_epsilon(recipe),
            clip=recipe.ratio_clip,
            max_new_tokens=recipe.decode.max_new_tokens,
            kl_coef=recipe.kl_coef,
            kl_estimator=recipe.kl_estimator,
            importance_cap=self.importance_cap(recipe),
        )

    def notes(self, recipe: Any) -> list[str]:
        """Where the ratio can differ from 1."""
        if recipe.num_iterations == 1 and (not recipe.decodes_ahead or recipe.old_policy == "learner"):
            return [
                "ratio 1 at every step, because no step lies between: epsilon, epsilon_high and ratio_clip have no effect. "
                "They have with num_iterations above 1, or with max_staleness and old_policy decoder"
            ]
        return [f"ratio clipped to {1 - recipe.epsilon:g} and {1 + highest_epsilon(recipe):g}"]


class TokenLevel(ClippedPolicyGradient):
    Keys = TokenLevelKeys

    def unit(self, recipe: Any) -> dict[str, Any]:
        return {"level": "token", "aggregation": recipe.loss_aggregation}


def highest_epsilon(recipe: Any) -> float:
    """What `epsilon_high` null stands for."""
    return recipe.epsilon if recipe.epsilon_high is None else recipe.epsilon_high
