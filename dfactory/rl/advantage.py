"""Group-relative advantages: how much better a rollout is than the others for the same prompt.

r_1 .. r_n are the rewards of the rollouts of one prompt, without those that have none:

    mean            A_i = r_i - mean(r)                                       GRPO, DeepSeekMath, arXiv:2402.03300
    leave_one_out   A_i = r_i - mean(r without r_i) = n / (n - 1) (r_i - mean(r))       RLOO, arXiv:2402.14740

With scale "group" the advantage is A_i / max(std(r), MIN_STD), std with n - 1 in its denominator (as in TRL, which adds
1e-4 instead of clamping). With scale "none" it is not divided (Dr. GRPO, arXiv:2503.20783: the division favours prompts
that are almost always or almost never solved).

A rollout without a reward has advantage 0 and weight 0. A group whose rewards are all equal, or with fewer than two
rewards, has no signal: its advantages are 0, and the caller drops or resamples it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

MIN_STD = 1e-4  # rewards that differ by less are noise of the reward function, which must not be amplified
EQUAL = 1e-8  # rewards this close are equal: sums of the same weighted scores may differ in their last bits


class GroupAdvantages(NamedTuple):
    advantage_G: np.ndarray  # float64; 0 without a reward
    weight_G: np.ndarray  # float64: 1 with a reward, 0 without
    has_signal: bool  # some two rewards of the group differ

    def weighted(self, weights: Callable[[np.ndarray], np.ndarray]) -> "GroupAdvantages":
        """With what an algorithm makes of the advantages of the rollouts that have a reward."""
        if not self.has_signal:
            return self
        advantage_G, scored_G = self.advantage_G.copy(), self.weight_G > 0
        advantage_G[scored_G] = weights(advantage_G[scored_G])
        return self._replace(advantage_G=advantage_G)


def group_advantages(
    reward_G: Sequence[float | None], *, baseline: str = "mean", scale: str = "group"
) -> GroupAdvantages:
    """Advantages of the G rollouts of one prompt; None is a rollout without a reward.

    >>> group_advantages([1.0, 0.0, 0.0, 1.0], scale="none").advantage_G.tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    if baseline not in ("mean", "leave_one_out") or scale not in ("group", "none"):
        raise ValueError(f"advantage_baseline {baseline!r}, scale_rewards {scale!r}: see RLKeys for the choices")
    scored_G = np.array([reward is not None for reward in reward_G])
    reward_n = np.array([reward for reward in reward_G if reward is not None], float)
    if not np.isfinite(reward_n).all():
        raise ValueError(f"rewards {reward_n.tolist()} are not all finite: a rollout without a reward is None")
    advantage_G, n = np.zeros(len(scored_G)), len(reward_n)
    has_signal = n > 1 and bool(np.ptp(reward_n) > EQUAL)
    if has_signal:
        advantage_n = reward_n - reward_n.mean()
        if baseline == "leave_one_out":
            advantage_n *= n / (n - 1)
        if scale == "group":
            advantage_n /= max(reward_n.std(ddof=1), MIN_STD)
        advantage_G[scored_G] = advantage_n
    return GroupAdvantages(advantage_G, scored_G.astype(float), has_signal)
