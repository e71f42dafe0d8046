"""How fast a run is for its hardware: tokens a second of a device, and model FLOPs utilisation where the peak is known."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dfactory.models.policy import Policy
from dfactory.planning.memory import count_parameters
from dfactory.planning.utilisation import model_flops, peak_of
from dfactory.recipe import Recipe
from dfactory.types import ViewBatch


class Speed:
    """Of the first rank's own micro-batches and device."""

    def __init__(self, recipe: Recipe, policy: Policy):
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.tflops = recipe.device_tflops or peak_of(name, recipe.dtype)
        self.policy = policy
        self.counts = count_parameters(Path(policy.source_dir)) if self.tflops and policy.source_dir else None

    def of(self, window: Sequence[ViewBatch], metrics: dict[str, float]) -> dict[str, float]:
        """`tokens_per_second_per_device`, and `mfu` in (0, 1) where the device's peak is known."""
        found = {"tokens_per_second_per_device": metrics["tokens_per_second"] / metrics["ranks"]}
        if self.counts is not None:
            facts = (self.policy.ends_at_targets, self.policy.has_adapters)
            flops = sum(model_flops(self.policy.config, self.counts, batch, *facts) for batch in window)
            found["mfu"] = flops / metrics["seconds"] / (self.tflops * 1e12)
        return found
