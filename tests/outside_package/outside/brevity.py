"""Short responses are better."""

from dfactory.rl.rewards.base import REWARDS, Reward


def brevity(prompts, completions, completion_ids, **columns) -> list[float]:
    """1 over the number of tokens."""
    return [1 / max(len(ids), 1) for ids in completion_ids]


REWARDS.add(Reward(brevity))
