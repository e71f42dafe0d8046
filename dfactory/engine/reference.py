"""The model that a policy is compared with, and the source that adds its scores to every batch.

    source --> ReferenceSource --> batch with the column `reference_elbo_D` --> objective
                    ^ asks a Reference for the ELBO of each document, on the same views that the policy gets

The reference is the model that a run starts from: a frozen copy, the policy with its LoRA adapters switched off, or the
scores that the model gave before training (stored.py).
"""

from collections.abc import Callable

import torch

from dfactory import distributed
from dfactory.algorithms.elbo import elbo
from dfactory.engine.trainer import Trainer, deepspeed_config, gather_moe_blocks_whole, start_engine, zero_stage
from dfactory.engine.window import MappedSource, Source
from dfactory.models.policy import Policy
from dfactory.recipe import Recipe
from dfactory.types import TokenScores, ViewBatch

Score = Callable[[ViewBatch], TokenScores]
"""A batch on any device -> a model's scores without gradient. All ranks call it together."""

Reference = Callable[[ViewBatch, int], torch.Tensor]
"""(batch, checksum of its records) -> ELBO of each document, [D] float32. All ranks call it together."""


class ReferenceSource(MappedSource):
    """Another source's batches with the reference's ELBO as a column."""

    def __init__(self, source: Source, reference: Reference):
        data = source.state_dict()["data"]
        super().__init__(source, lambda batch: batch.with_columns(reference_elbo_D=reference(batch, data)))


def elbo_by(score: Score) -> Reference:
    """A reference that scores with a model."""
    return lambda batch, _: elbo(batch, score(batch).logprob_N.to(batch.elbo_weight_N.device))


def adapter_off(trainer: Trainer) -> Score:
    """Scores of the policy in training with its LoRA adapters off."""

    def score(batch: ViewBatch) -> TokenScores:
        with trainer.policy.model.disable_adapter():
            return trainer.score(batch)

    return score


def frozen_copy(recipe: Recipe, policy: Policy) -> Score:
    """Scores of a second model that is never trained. Under ZeRO-3 it is sharded like the policy, otherwise whole."""
    model = policy.eval().requires_grad_(False)
    if zero_stage(recipe) < 3:
        model.to(distributed.device())
    else:
        gather_moe_blocks_whole(policy)
        config = deepspeed_config(recipe)
        config.pop("optimizer", None)
        config["zero_optimization"].pop("offload_optimizer", None)  # there is no optimiser
        model = start_engine(policy, config)

    @torch.no_grad()
    def score(batch: ViewBatch) -> TokenScores:
        return model(batch.to(distributed.device()))

    return score
