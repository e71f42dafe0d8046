"""Metrics of a step's rollouts, with the names of TRL's GRPO trainer where it has them."""

import statistics

from dfactory.rl.scoring import ScoredGroup
from dfactory.types import FinishReason


def batch_metrics(groups: list[ScoredGroup], version: int) -> dict[str, float]:
    """Means over all groups that the step collected, those without a signal included."""
    rollouts = [rollout for group in groups for rollout in group.decoded.rollouts]
    rewards = [reward for group in groups for reward in group.rewards if reward is not None]
    scored = [[reward for reward in group.rewards if reward is not None] for group in groups]
    lengths = [len(rollout.output_ids) for rollout in rollouts]
    metrics = {
        "reward_std": _mean([statistics.stdev(group) for group in scored if len(group) > 1]),
        "frac_reward_zero_std": _mean([not group.has_signal for group in groups]),
        "unscored": 1 - len(rewards) / len(rollouts),
        "completions/mean_length": _mean(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([r.finish_reason is FinishReason.LENGTH for r in rollouts]),
        "tokens_per_forward": sum(lengths) / max(sum(rollout.forwards for rollout in rollouts), 1),
        "unique_fraction": _mean([len(set(group.texts)) / len(group.texts) for group in groups]),
        "staleness": _mean([version - group.decoded.version for group in groups]),
        "seconds/rollout": sum(group.decoded.seconds for group in groups),
        "seconds/reward": sum(group.seconds for group in groups),
        "groups": float(len(groups)),
    }
    gaps = [group.decoded.decoder_gap for group in groups if group.decoded.decoder_gap is not None]
    if gaps:
        metrics["decoder_gap"] = _mean(gaps)
    if rewards:
        metrics["reward"] = _mean(rewards)
    for name in groups[0].result.functions:
        scores = [s for group in groups for s in group.result.functions[name].score_G if s is not None]
        if scores:
            metrics[f"rewards/{name}/mean"] = _mean(scores)
    return metrics


def _mean(values: list) -> float:
    return sum(map(float, values)) / len(values) if values else 0.0
