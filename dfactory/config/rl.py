"""Recipe keys of reinforcement learning: rewards, groups and advantages."""

from dataclasses import dataclass
from typing import Any, Optional

from dfactory.config.keys import key


@dataclass
class RLKeys:
    reward_funcs: list[Any] = key(
        [],
        "rewards: a builtin's name, a dotted path `pkg.module.function`, or `file.py:function` (relative to the recipe); "
        "or a mapping {name: one of these, weight: 1.0, ...options of that reward}",
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
        60.0, "a reward function that takes longer for one group is killed; its rollouts are unscored", low=0.01
    )
    reward_worker_memory_mb: int = key(
        4096, "a reward process that has come to hold more is replaced after its group", low=64
    )
    allow_code_execution: bool = key(
        False, "let rewards run the programs that the model writes, in the sandbox (dfactory/rl/sandbox.py)"
    )
