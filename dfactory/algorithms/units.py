"""Sums over the rollouts of a batch. The targets of a rollout may lie in several rows, as documents of their own with one
`rollout_D`; U counts the rollouts."""

import torch

from dfactory.types import ViewBatch


def units(batch: ViewBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The rollout numbers in the batch, ascending [U], and for each target which of them is its own [N]."""
    rollout_U = batch.columns["rollout_D"].unique()
    return rollout_U, torch.searchsorted(rollout_U, batch.columns["rollout_D"][batch.document_N])


def sum_by_unit(batch: ViewBatch, value_N: torch.Tensor) -> torch.Tensor:
    """Sums of a number a target over each rollout, float32 [U], differentiable."""
    rollout_U, unit_N = units(batch)
    return torch.zeros(len(rollout_U), device=value_N.device).index_add(0, unit_N, value_N)


def by_unit(batch: ViewBatch, value_D: torch.Tensor) -> torch.Tensor:
    """A number that all documents of a rollout share, once a rollout, float32 [U]."""
    rollout_U = batch.columns["rollout_D"].unique()
    index_D = torch.searchsorted(rollout_U, batch.columns["rollout_D"])
    return torch.zeros(len(rollout_U), device=value_D.device).index_copy(0, index_D, value_D.float())
