"""What the algorithms of reinforcement learning share: keys of prompts, rewards, rollouts and processes, and their rules.

Such an algorithm says what stands for a rollout's likelihood, by its views (docs/method.md#policy-gradients). Weights come
divided by the number of views where the views are samples, so that a sum over targets is the estimate.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Optional

import numpy as np

from dfactory.algorithms.base import ALGORITHMS, Algorithm, Data, selected
from dfactory.config.keys import key
from dfactory.decoding.keys import trace_problem
from dfactory.noise import RandomMask
from dfactory.types import AlignedDocument, View

RolloutViews = Callable[[AlignedDocument, int], tuple[AlignedDocument, list[View]]]
"""(document of a rollout, its index in the group) -> the document as the clean stream shows it, and its views."""


@dataclasses.dataclass
class RolloutKeys:
    reward_funcs: list[Any] = key(
        [],
        "rewards: the name of a builtin or of one that an installed package adds, a dotted path `pkg.module.function`, or "
        "`file.py:function` (relative to the recipe); "
        "or a mapping {name: one of these, weight: 1.0, per_rollout: false, ...options of that reward}",
    )
    reward_weights: Optional[list[float]] = key(
        None, "one weight a reward, instead of `weight` in the entries; null: 1 each"
    )
    num_generations: int = key(8, "G: rollouts of a prompt, compared with each other", low=2)
    scale_rewards: str = key(
        "group",
        "divide advantages by the standard deviation of their group, or not (Dr. GRPO)",
        choices=("group", "none"),
    )
    advantage_baseline: str = key(
        "mean",
        "subtract the mean reward of the group, or of the other rollouts of the group",
        choices=("mean", "leave_one_out"),
    )
    reward_workers: int = key(2, "processes that compute rewards", low=1)
    reward_timeout_s: float = key(
        60.0,
        "a reward that takes longer for one group (with per_rollout: one rollout) is killed, and nothing is scored",
        low=0.01,
    )
    reward_worker_memory_mb: int = key(
        4096, "a reward process that has come to hold more is replaced after its group", low=64
    )
    allow_code_execution: bool = key(
        False, "let rewards run the programs that the model writes, in the sandbox (dfactory/rl/sandbox/)"
    )

    train_after_eos: bool = key(
        False,
        "train on what the decoder put after EOS to the end of the block, too; no reward sees it, but tokens of the answer "
        "that were committed later saw it",
    )
    num_iterations: int = key(1, "optimiser steps on the same rollouts", low=1)

    prompts_per_step: int = key(8, "prompts whose groups make one optimiser step", low=1)
    zero_signal: str = key(
        "resample",
        "a group whose rewards are all equal teaches nothing: leave it out of the step, or take another prompt",
        choices=("drop", "resample"),
    )
    max_steps_without_signal: int = key(
        10, "stop when no group had a signal, among as many as so many steps take", low=1
    )
    max_staleness: int = key(
        0,
        "how many policy versions a rollout may be older than the first step on it; below num_iterations: synchronous",
        low=0,
    )
    num_learners: int = key(1, "learner processes (DeepSpeed ranks)", low=1)
    num_rollout_workers: int = key(1, "processes that decode", low=1)
    rollout_timeout_s: float = key(600.0, "a decoding call that takes longer counts as hung: restarted", low=1.0)
    max_rollout_attempts: int = key(3, "tries of a prompt's group before the run gives up", low=1)
    heartbeat_timeout_s: float = key(
        300.0, "a learner or controller without a heartbeat for so long counts as lost: the run ends", low=5.0
    )
    cluster_timeout_s: float = key(300.0, "longest wait for the processes to be placed", low=1.0)


class RolloutAlgorithm(Algorithm):
    """Learns from what the policy answers to prompts, by rewards."""

    data = Data.PROMPTS
    Keys = RolloutKeys
    recorded: ClassVar[bool] = False
    """Whether the views are made of the decoder's own steps."""

    @property
    def selects(self) -> dict[str, str]:
        return {"stage": "rl", "policy_loss": self.name}

    def views(self, recipe: Any, random_mask: RandomMask) -> RolloutViews:
        """What makes the views of a rollout. `random_mask` makes those of supervised training."""
        raise NotImplementedError

    def weights(self, recipe: Any, advantage_G: np.ndarray) -> np.ndarray:
        """What multiplies the likelihoods of the scored rollouts of one prompt: their advantages."""
        return advantage_G

    def notes(self, recipe: Any) -> list[str]:
        """What `check` says of the loss beside the shape of a step."""
        return []

    def is_recorded(self, recipe: Any) -> bool:
        """Whether every view is a step of the decoder, so that it has recorded the likelihood of every target."""
        return False

    def importance_cap(self, recipe: Any) -> float | None:
        """The largest importance weight of a target, where the decoder's record gives it one."""
        return None

    def problems(self, recipe: Any) -> Iterator[str]:
        stage, decode = f"stage {recipe.stage}", recipe.decode
        if not recipe.reward_funcs:
            yield f"reward_funcs is empty with {stage}: name at least one, such as exact_match"
        if recipe.max_steps is None:
            yield f"max_steps null with {stage}: rollouts never end; say how many steps"
        yield from self._decoding_problems(recipe)
        if recipe.block_size is not None and decode.block_size not in (None, recipe.block_size):
            yield f"decode.block_size with {stage}: it is block_size"
        if decode.max_new_tokens >= recipe.max_length:
            yield (
                f"decode.max_new_tokens {decode.max_new_tokens} leaves no room for a prompt in max_length "
                f"{recipe.max_length}"
            )
        if recipe.expert_parallel_size > 1:
            yield (
                f"expert_parallel_size {recipe.expert_parallel_size} with {stage} is not supported: its tensors have other "
                "names"
            )
        if recipe.views_are_traces:
            yield (
                f"view_source {recipe.view_source} with {stage}: say {_recorded()} to train on the decoder's own steps, and "
                "leave view_source at mask"
            )
        if recipe.edits:
            yield f"edit_share or num_turns with {stage}: rollouts are trained on as they were decoded"

    def _decoding_problems(self, recipe: Any) -> Iterator[str]:
        """Of the distribution that rollouts are drawn from."""
        stage, decode = f"stage {recipe.stage}", recipe.decode
        if decode.temperature == 0:
            yield f"decode.temperature 0 with {stage}: all rollouts of a prompt would be the same; use 1.0"
        if decode.acceptance != "top":
            yield (
                f"decode.acceptance {decode.acceptance} with {stage} starves rare tokens and biases the ratio; use top"
            )
        if self.recorded and (unlikely := trace_problem(decode)):
            given, why = unlikely
            yield f"{given} with {self.selector}: {why}; set it otherwise, or use another policy_loss"
        if decode.cfg_scale:
            yield (
                f"decode.cfg_scale {decode.cfg_scale:g} with {stage}: the learner's likelihood is that of the distribution "
                "without guidance; set it to 0"
            )
        if decode.blocks_from != "start":
            yield (
                f"decode.blocks_from {decode.blocks_from} with {stage}: rollouts are trained on in blocks that are counted "
                "from the start; set it to start"
            )
        if decode.early_stop and recipe.block_size is not None:
            yield (
                f"decode.early_stop true with {stage}: a block that is not decoded to its end leaves masks among the clean "
                "tokens; set it to false"
            )
        if decode.top_p is not None or decode.top_k is not None:
            yield (
                f"decode.temperature, top_k or top_p other than 1.0, null, null with {stage}: the learner's likelihood is "
                "that of the unprocessed distribution, and no weight brings back tokens that cannot come out"
            )
        if decode.temperature not in (0, 1) and self.importance_cap(recipe) is None:
            yield (
                f"decode.temperature {decode.temperature:g} with {stage}, {self.selector} and importance_cap "
                f"{recipe.importance_cap}: the learner's likelihood is that of temperature 1.0; only {_recorded()} with an "
                "importance_cap weighs the difference"
            )


def _recorded() -> str:
    return " or ".join(a.selector for a in ALGORITHMS if isinstance(a, RolloutAlgorithm) and a.recorded)


def rollout_views(recipe: Any, random_mask: RandomMask) -> RolloutViews:
    """The views that a recipe's algorithm asks for."""
    return selected(recipe).views(recipe, random_mask)


def mean_of(views: list[View]) -> list[View]:
    """Views whose weighted sum over all targets is the mean of their estimates."""
    return [dataclasses.replace(view, elbo_weight_P=view.elbo_weight_P / len(views)) for view in views]
