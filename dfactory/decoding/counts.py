"""Step schedules: how many masks each step of a block commits, at least (docs/method.md#commit).

A schedule takes the masks that are left and the steps done, and so also holds where a step commits more than its share, and
where a prompt or a draft fills a part of the block. No step commits less than one: a forward that commits nothing is wasted.

Letters: R responses that are decoded together.
"""

from collections.abc import Callable

import torch


def even(masks_R: torch.Tensor, step_R: torch.Tensor, steps: int, block_size: int) -> torch.Tensor:
    """The same at every step; what is left over goes to the first ones. 32 in 6: 6 6 5 5 5 5; 10 in 3: 4 3 3."""
    return -(-masks_R // _left(step_R, steps))


def ascending(masks_R: torch.Tensor, step_R: torch.Tensor, steps: int, block_size: int) -> torch.Tensor:
    """As if the steps left took 1, 2, 4, ... of 2^steps - 1 equal shares (CJ-GRPO). A share is rounded down, and the last
    step takes the rest. 32 in 6: 1 1 2 4 8 16; 10 in 3: 1 3 6."""
    shares_R = 2 ** _left(step_R, steps).clamp(max=62) - 1  # beyond, no share reaches one token, and int64 ends
    return masks_R // shares_R


def whole_block(masks_R: torch.Tensor, step_R: torch.Tensor, steps: int, block_size: int) -> torch.Tensor:
    """Even shares of the whole block, however many masks it has left (SDAR). A block of 8 in 3: 3 3 2; with 4 masks: 3 1."""
    return block_size // steps + (step_R < block_size % steps).long()


def rounded(masks_R: torch.Tensor, step_R: torch.Tensor, steps: int, block_size: int) -> torch.Tensor:
    """Masks left over steps left, to the nearest number (dllm). 10 in 3: 3 3 4.

    The share is 1 - s / t, of times in float32 that come from 1 - (1 - t): as in the original, their rounding
    errors decide where a half goes.
    """
    time_S = 1 - (1 - (torch.arange(steps + 1, device=step_R.device).double() / steps).float())
    left_R = _left(step_R, steps)
    return (masks_R * (1 - (time_S[left_R - 1] / time_S[left_R]).double())).round().long()


def _left(step_R: torch.Tensor, steps: int) -> torch.Tensor:
    return (steps - step_R).clamp(min=1)


SCHEDULES: dict[str, Callable[..., torch.Tensor]] = {
    "even": even,
    "ascending": ascending,
    "block": whole_block,
    "rounded": rounded,
}


def least_counts(
    schedule: str, masks_R: torch.Tensor, step_R: torch.Tensor, steps: int, block_size: int
) -> torch.Tensor:
    """int64 [R], at least 1: what the step after `step_R` ones commits of `masks_R` masks."""
    return SCHEDULES[schedule](masks_R, step_R, steps, block_size).clamp(min=1)
