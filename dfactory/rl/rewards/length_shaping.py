"""DAPO's soft punishment of overlong responses (arXiv:2503.14476, equation 13), in TRL's implementation."""

from dfactory.rl.rewards.base import REWARDS, Reward


def length_shaping(
    prompts, completions, *, completion_ids: list[list[int]], max_length: int, cache: int, **columns
) -> list[float]:
    """0 up to max_length - cache tokens, then linearly down to -1 at max_length, and -1 beyond.

    max_length 100, cache 20: 80 tokens score 0, 90 score -0.5, 100 and more score -1.
    """
    from trl.rewards import get_soft_overlong_punishment

    if not 0 <= cache <= max_length:
        raise ValueError(f"length_shaping: cache {cache} must lie in 0 .. max_length {max_length}")
    return get_soft_overlong_punishment(max_length, cache)(completion_ids)


REWARDS.add(Reward(length_shaping, requires=("trl.rewards",)))
