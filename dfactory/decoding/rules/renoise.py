"""Denoise a canvas of random tokens, as DiffusionGemma's sampler does (docs/method.md#renoising).

For models with uniform noise: nothing marks what is still to be predicted, so each forward predicts the whole canvas and
decides which predictions the next one starts from. The canvas becomes tokens at its last forward, all at once.
"""

import dataclasses

import torch

from dfactory.config.keys import key
from dfactory.decoding.rules.base import ENTROPY, RULES, Forward, Served
from dfactory.decoding.rules.entropy_bound import EntropyBound


@RULES.add
@dataclasses.dataclass(frozen=True)
class Renoise(EntropyBound):
    """Predictions are kept by ascending entropy within `entropy_bound`; the other positions get random tokens again.

    The distribution of forward i of n is softmax(logits / T), with T falling from `temperature_high` in equal steps to
    temperature_low + (temperature_high - temperature_low) / n at the last. A canvas ends early when its most probable tokens
    are those of the last `stable_forwards` forwards and the mean entropy is below `confident_entropy`.
    """

    name = "renoise"
    reads = (ENTROPY,)
    renoises = True
    may_wait = True
    keeps_distribution = False

    denoising_steps: int = key(48, "most forwards of a canvas", low=1)
    temperature_high: float = key(0.8, "divides the logits of a canvas's first forward", low=0.01)
    temperature_low: float = key(0.4, "approached by that divisor towards the last one", low=0.01)
    stable_forwards: int = key(
        1, "forwards before, whose most probable tokens have to be the same for an early end", low=0
    )
    confident_entropy: float = key(0.005, "mean entropy in nats below which a canvas may end early", low=0.0)

    def temperature(self, step: int) -> float:
        """What divides the logits at a forward of a canvas, counted from 0."""
        left = (self.denoising_steps - step) / self.denoising_steps
        return self.temperature_low + (self.temperature_high - self.temperature_low) * left

    def kept(self, entropy_RB: torch.Tensor) -> torch.Tensor:
        """bool [R, B]: the predictions that stand in the next canvas."""
        return self.within(entropy_RB)

    def ends(self, top_RB: torch.Tensor, history_RKB: torch.Tensor, entropy_RB: torch.Tensor) -> torch.Tensor:
        """bool [R]: whether a canvas ends early. `history_RKB` are the most probable tokens of its last forwards, -1 where
        there was none."""
        stable_R = (history_RKB == top_RB[:, None]).all(dim=-1).all(dim=-1)
        return stable_R & (entropy_RB.mean(dim=-1) < self.confident_entropy)

    def commit(self, forward: Forward) -> torch.Tensor:
        """Nothing by itself: the decoder (renoising.py) asks `kept` and `ends`."""
        return torch.zeros_like(forward.masked_RB)

    def most_steps(self, block_size: int) -> int:
        return self.denoising_steps

    def in_sglang(self, editing_threshold: float | None, max_post_steps: int) -> Served | None:
        keys = {
            "max_denoising_steps": self.denoising_steps,
            "sampler_config": {"entropy_bound": self.entropy_bound},
            "temperature_schedule": {"t_min": self.temperature_low, "t_max": self.temperature_high},
            "stopping_config": {
                "confidence_threshold": self.confident_entropy,
                "stability_threshold": self.stable_forwards,
            },
        }
        return Served("Gemma4Renoise", keys)

    def problem(self, block_size: int | None) -> str | None:
        if self.temperature_low > self.temperature_high:
            return (
                f"decode.temperature_low {self.temperature_low:g} > decode.temperature_high {self.temperature_high:g}: swap "
                "them"
            )
        return None
