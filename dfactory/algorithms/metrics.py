"""Means over targets that objectives log."""

import torch

from dfactory.types import Mean, TokenScores, ViewBatch


def token_metrics(batch: ViewBatch, scores: TokenScores) -> dict[str, Mean]:
    """Means over the real targets, which every objective logs. The fill is easy, and its share grows with the block size."""
    count = batch.real_N.sum()
    return {
        "token_nll": Mean(-torch.where(batch.real_N, scores.logprob_N.detach(), 0.0).sum(), count),
        "hit_rate": Mean((scores.hit_N * batch.real_N).sum(), count),
        "entropy": Mean(torch.where(batch.real_N, scores.entropy_N.detach(), 0.0).sum(), count),
    }


def metrics_by_kind(batch: ViewBatch, scores: TokenScores, mask_id: int) -> dict[str, Mean]:
    """NLL and hit rate of masked, edited and kept real targets: those where [M], a wrong token or the right one stands."""
    masked_N, kept_N = batch.input_N == mask_id, batch.input_N == batch.target_ids_N
    metrics = {}
    for kind, kind_N in {"masked": masked_N, "edited": ~masked_N & ~kept_N, "kept": kept_N}.items():
        here_N = kind_N & batch.real_N
        metrics[f"token_nll_{kind}"] = Mean(-(scores.logprob_N.detach() * here_N).sum(), here_N.sum())
        metrics[f"hit_rate_{kind}"] = Mean((scores.hit_N & here_N).sum(), here_N.sum())
    return metrics
