"""RolloutSource: the batch source of reinforcement learning. The training loop cannot tell it from one that reads records.

`next_window` does, on every learner rank alike:

    1. publish the weights of this policy version (all ranks gather, rank 0 puts)
    2. ask the controller for the scored rollouts of this step; all ranks get the same ones
    3. documents, views, rows; each rank takes its share of the rollouts, and those of one prompt stand side by side,
       so that the prompt is computed once a row
    4. score them: the old log-probabilities, on the very views that are trained on; and as the reference is, where there
       is a KL term

The ratio's denominator is the policy that decoded (docs/method.md#staleness). Of a rollout that the newest weights
made, the learner computes it. Of a stale one it has no weights any more: for `trace` the decoder recorded the
likelihood of the same steps; for ELBO views, or at another temperature, the rollout actor scored its rollouts before it
took new weights (actors.py). `old_policy: learner` takes the learner's policy at the first step on the rollouts,
however old they are.

The decoder's distribution is not quite the learner's: special tokens are suppressed, it may have a temperature, and
engines and precisions round otherwise. For `trace` each target gets the truncated importance weight min(cap, old /
recorded), as a constant. With `old_policy: learner` it covers staleness too, which is the decoupled objective of AReaL
(arXiv:2505.24298). ELBO views are no steps of the decoder: it has no record of them, so there is no weight.

`check` then holds training to it: at the first step on new rollouts the ratio of the fresh ones is 1, because no step
lies between. Where rollouts are used once, that makes the learner's pass over fresh ones superfluous: the old
log-probabilities are those of the training forward itself, as constants. Then only the first global batch and every
CHECKED_EVERY-th is scored, to compare.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from dfactory.algorithms.rollouts import RolloutViews
from dfactory.errors import RolloutError
from dfactory.rl.rollouts import RolloutBatch, ScoredRollout
from dfactory.rl.rows import RolloutRows, at_targets, rollout_of
from dfactory.types import TokenScores, ViewBatch

Score = Callable[[ViewBatch], TokenScores]

# Two forwards of one policy differ by rounding where they use other kernels or another order of summation. In float32
# that is 1e-6 nat. In bfloat16 activations keep 8 bits: rounding moves the log-probabilities of the quickstart's model, 3
# layers and 8 experts, by 0.010 to 0.016 nat on average, and by 0.1 at the 99th percentile (measured against float32). For
# a 16B MoE the bound is an estimate: errors of layers add up like independent ones, so 20 layers make it 0.03 to 0.04; and
# experts whose router scores are closer than rounding change places, where a flip replaces the weakest of 8, about a tenth
# of a layer's output, which at most doubles it. What the check is for is larger: lora_dropout 0.5 moves a target by 0.5.
CHECKED_EVERY = 10  # global batches, of which one has its ratios compared with 1 although they are known to be 1
RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
"""By dtype: how far, in nats a target on average, two forwards of the same policy may lie apart."""


class RolloutClient(Protocol):
    """The controller, as a learner sees it."""

    def publish(self, version: int, groups: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Make a version of the weights the rollout actors' next one; times and bytes. Only rank 0 calls it."""

    def next_batch(self, version: int, next_group: int) -> RolloutBatch: ...


class RolloutSource:
    """Windows of micro-batches from rollouts.

    Two callables come from the engine. `weights` yields the groups of named tensors to publish; every rank has to run
    through it, because sharded parameters are gathered by all. `score` is the policy in training, without gradient;
    `reference` the same of the reference, None without a KL term. `num_iterations` windows are made of the same rollouts,
    with the same views; a run that is resumed between them goes on with new rollouts.
    """

    def __init__(
        self,
        client: RolloutClient,
        weights: Callable[[], Iterable[dict[str, torch.Tensor]]],
        score: Score,
        make_views: RolloutViews,
        *,
        block_size: int,
        row_length: int,
        rank: int,
        world_size: int,
        micro_batch_rows: int,
        num_iterations: int = 1,
        reference: Score | None = None,
        traces: bool = False,
        old_policy: str = "decoder",
        train_after_eos: bool = True,
        padded: bool = True,
        compares: bool = True,
        knows_ratio_1: bool = False,
        ratio_tolerance: float = RATIO_TOLERANCE["float32"],
    ):
        self.client, self.weights = client, weights
        self.score, self.reference = score, reference
        self.rows = RolloutRows(
            make_views, block_size, row_length, world_size, micro_batch_rows, train_after_eos, padded
        )
        self.rank = rank
        self.traces, self.old_policy = traces, old_policy
        self.compares = compares  # with old log-probabilities
        # Whether the objective takes fresh rollouts without them, and two forwards of one policy agree (no dropout).
        self.knows_ratio_1 = knows_ratio_1 and num_iterations == 1
        self.num_iterations, self.ratio_tolerance = num_iterations, ratio_tolerance
        self.version = 0  # policy versions made so far: optimiser steps
        self.next_group = 0
        self.epoch = 0.0  # passes over the prompts
        self.metrics: dict[str, float] = {}
        self._window: list[ViewBatch] = []
        self._uses = 0
        self._new = False  # whether the last window was the first one of its rollouts

    def next_window(self) -> list[ViewBatch] | None:
        self._new = self._uses == 0
        if self._new:
            published = self._publish()
            batch = self.client.next_batch(self.version, self.next_group)
            self._window = self._with_scores(self.rows.build(batch.rollouts, self.rank), batch.rollouts)
            self.next_group, self.epoch = batch.next_group, batch.epoch
            self.metrics = batch.metrics | published
        self._uses = (self._uses + 1) % self.num_iterations
        self.version += 1
        return self._window

    def check(self, metrics: dict[str, float]) -> None:
        """Raises RolloutError if the policy had changed before the first step on new rollouts. `logprob_change_fresh`
        compares with old log-probabilities that the learner has just computed; the two passes of a window that is replayed
        are compared as `replay_gap`."""
        for name in ("logprob_change_fresh", "replay_gap"):
            if self._new and metrics.get(name, 0.0) > self.ratio_tolerance:  # NaN: runs/nonfinite.py has seen to it
                raise RolloutError(
                    f"{name} {metrics[name]:.3g} at the first step on new rollouts, in nats a target; at most "
                    f"{self.ratio_tolerance:g} is rounding: two forwards of one policy must agree, or the ratio is not 1. "
                    "Likely causes: lora_dropout (set it to 0), or a kernel that is not deterministic (try another "
                    "attn_implementation)"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "next_group": self.next_group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version, self.next_group = state["version"], state["next_group"]

    def _publish(self) -> dict[str, float]:
        groups = self.weights()
        if self.rank == 0:
            return self.client.publish(self.version, groups)
        for _ in groups:  # the gathers are collective
            pass
        return {}

    def _with_scores(self, batches: list[ViewBatch], rollouts: Sequence[ScoredRollout]) -> list[ViewBatch]:
        """The batches with the columns `old_logprob_N`, `fresh_N` (whether the learner has just computed it), and what else
        the recipe asks for. All ranks skip the learner's pass alike, because scoring is collective."""
        scored = []
        fresh = torch.tensor([not self._is_stale(scored) for scored in rollouts], dtype=torch.bool)
        compares = self.compares and not self._ratio_is_1(fresh)
        for batch in batches:
            columns = self._old_columns(batch, rollouts, fresh) if compares else {}
            # A trace's targets are the decoder's own commits, so its record corrects for the distribution that it drew from.
            if self.compares and self.traces:
                columns["recorded_logprob_N"] = recorded(batch, rollouts)
            if self.reference is not None:
                columns["reference_logprob_N"] = self.reference(batch).logprob_N.cpu()
            scored.append(batch.with_columns(**columns))
        return scored

    def _old_columns(
        self, batch: ViewBatch, rollouts: Sequence[ScoredRollout], fresh: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What a ratio compares with. `fresh`: of each rollout whether the newest weights made it, bool."""
        fresh_N = fresh[rollout_of(batch)]  # [rollouts] -> [N]
        # `fresh.any()` is the same on all ranks, because all have the same rollouts: scoring is collective.
        old_N = self.score(batch).logprob_N.cpu() if fresh.any() else torch.zeros(batch.num_targets)
        if not fresh.all():
            old_N = torch.where(fresh_N, old_N, self._decoders(batch, rollouts))
        return {"old_logprob_N": old_N, "fresh_N": fresh_N}

    def _ratio_is_1(self, fresh: torch.Tensor) -> bool:
        """Whether the training forward itself gives the old log-probabilities, and no check is due; alike on all ranks. When
        one is due depends on the step's number alone, so that a resumed run makes the same ones."""
        return self.knows_ratio_1 and bool(fresh.all()) and self.version % CHECKED_EVERY > 0

    def _is_stale(self, scored: ScoredRollout) -> bool:
        """Whether steps lie between the policy that decoded a rollout and the learner's, and the ratio is to count them."""
        return self.old_policy == "decoder" and scored.version is not None and scored.version < self.version

    def _decoders(self, batch: ViewBatch, rollouts: Sequence[ScoredRollout]) -> torch.Tensor:
        """The log-probability of each target under the policy that decoded: as its actor scored it, or as it recorded it."""
        if self.traces and rollouts[0].old_logprob is None:
            return recorded(batch, rollouts)
        return at_targets(batch, [one.old_logprob for one in rollouts], batch.columns["target_number_N"])


def recorded(batch: ViewBatch, rollouts: Sequence[ScoredRollout]) -> torch.Tensor:
    """The decoder's own log-probability of each target when it committed it, under the distribution that it drew from."""
    # A value a token of prompt and response, looked up by position: targets are never in the prompt.
    values = [np.array([0.0] * len(one.rollout.prompt_ids) + one.rollout.commit_logprob) for one in rollouts]
    return at_targets(batch, values, batch.position_ids_RS.flatten()[batch.target_index_N])
