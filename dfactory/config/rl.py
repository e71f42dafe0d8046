"""Recipe keys of reinforcement learning: rewards, groups, advantages, the policy loss, rollouts and processes."""

from dataclasses import dataclass
from typing import Any, Optional

from dfactory.config.keys import key


@dataclass
class RLKeys:
    reward_funcs: list[Any] = key(
        [],
        "rewards: a builtin's name, a dotted path `pkg.module.function`, or `file.py:function` (relative to the recipe); "
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

    policy_loss: str = key(
        "trace",
        "what stands for a rollout's likelihood: the decoder's own steps (trace), ELBO views (ebpo), or one view with the "
        "whole response masked (diffu_grpo)",
        choices=("trace", "ebpo", "diffu_grpo"),
    )
    trace_steps: Optional[int] = key(
        None, "policy_loss trace: sampled steps a block, weighted by 1 / probability; null: all of them", low=1
    )
    ratio_normalisation: str = key(
        "mean",
        "policy_loss ebpo: the log-ratio of a response is a sum, divided by its tokens, or divided by its blocks; "
        "epsilon has to be meant for it",
        choices=("sum", "mean", "block"),
    )
    epsilon: float = key(0.2, "the ratio is clipped below at 1 - epsilon", low=0.0)
    epsilon_high: Optional[float] = key(None, "and above at 1 + epsilon_high; null: epsilon", low=0.0)
    ratio_clip: str = key(
        "ppo",
        "the smaller of clipped and plain gain (ppo), or clipped ratios as self-normalised constant weights whatever the "
        "advantage's sign (unconditional)",
        choices=("ppo", "unconditional"),
    )
    loss_aggregation: str = key(
        "grpo",
        "token-level losses: mean by response, then over responses (grpo); over tokens (dapo); over a constant (dr_grpo)",
        choices=("grpo", "dapo", "dr_grpo"),
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
    importance_cap: Optional[float] = key(
        2.0,
        "policy_loss trace: each target weighs exp(old log-probability - the decoder's recorded one), at most this; null: 1",
        low=1.0,
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
        "policy versions that a rollout may lie behind the first step that trains on it; below num_iterations: synchronous",
        low=0,
    )
    num_learners: int = key(1, "learner processes (DeepSpeed ranks)", low=1)
    num_rollout_workers: int = key(1, "processes that decode", low=1)
    rollout_timeout_s: float = key(600.0, "a decoding call that takes longer counts as hung: restarted", low=1.0)
    max_rollout_attempts: int = key(3, "tries of a prompt's group before the run gives up", low=1)
    heartbeat_timeout_s: float = key(
        300.0, "a learner or controller that gives no sign of life for so long is taken for lost: the run ends", low=5.0
    )
    cluster_timeout_s: float = key(300.0, "longest wait for the processes to be placed", low=1.0)
