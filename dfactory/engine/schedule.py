"""The learning rate of a step, as a function of its number.

The formulas are those of transformers' `cosine_with_min_lr`, `polynomial` of power 1 and `constant_with_warmup`, to the
digit (tests/engine/test_options.py). Its module of schedules imports peft, half a second before the first step.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dfactory.recipe import Recipe


def learning_rate_schedule(recipe: Recipe, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """Warmup from 0, then cosine, linear or constant. The last step of cosine and linear has lr_min.

    An lr_min of 0 would waste that step, so 0 is reached one step after the end, as in transformers. If the warmup takes the
    whole run, the schedule gets one step more, because the decay would be divided by zero steps.
    """
    warmup = recipe.warmup_of(num_steps)
    end = max(num_steps - (recipe.lr_min > 0), warmup + 1)
    decay = _DECAYS[recipe.lr_scheduler_type if recipe.lr_min != recipe.learning_rate else "constant"]

    def share(step: int) -> float:
        """Of the peak."""
        if step < warmup:
            return step / warmup
        return decay((step - warmup) / (end - warmup), recipe.learning_rate, recipe.lr_min)

    return LambdaLR(optimizer, share)


def _cosine(progress: float, peak: float, low: float) -> float:
    least = low / peak
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)) * (1 - least) + least)


def _linear(progress: float, peak: float, low: float) -> float:
    return ((peak - low) * (1 - min(progress, 1.0)) + low) / peak


def _constant(progress: float, peak: float, low: float) -> float:
    return 1.0


_DECAYS: dict[str, Callable[[float, float, float], float]] = {  # by lr_scheduler_type
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
}
