"""Speed as a reward: response tokens per forward pass of the decoder (docs/method.md#stop)."""

from dfactory.rl.rewards.base import REWARDS, Reward


def tokens_per_forward(
    prompts, completions, *, tokens_per_forward: list[float], scale: float = 1.0, cap: float = 1.0, **columns
) -> list[float]:
    """min(scale * tokens per forward, cap).

    The cap has a use: fluent nonsense decodes fastest, so speed must not outbid a right answer. Weigh it accordingly.
    """
    return [min(scale * speed, cap) for speed in tokens_per_forward]


REWARDS.add(Reward(tokens_per_forward))
