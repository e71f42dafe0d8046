"""What the decoder's forwards saw, rebuilt from a Rollout (METHOD section 8, trace views)."""

import numpy as np

from dfactory.types import Rollout


def state_before(rollout: Rollout, step: int, mask_id: int) -> np.ndarray:
    """The response as forward `step` saw it, to the end of the block that it ran on: int64, masks included.

    `step` counts from 0 over the whole response. What that forward changed is where `state_after` differs.
    """
    return _state(rollout, step, step, mask_id)


def state_after(rollout: Rollout, step: int, mask_id: int) -> np.ndarray:
    """The response as forward `step` left it, to the end of the block that it ran on."""
    return _state(rollout, step, step + 1, mask_id)


def block_of_step(rollout: Rollout, step: int) -> int:
    """The block, counted from the start of the document, that forward `step` ran on."""
    if not 0 <= step < rollout.forwards:
        raise IndexError(f"step {step} of a rollout with {rollout.forwards} forwards")
    decoded = int(np.searchsorted(np.cumsum(rollout.block_forwards), step, side="right"))
    return len(rollout.prompt_ids) // rollout.block_size + decoded


def _state(rollout: Rollout, step: int, time: int, mask_id: int) -> np.ndarray:
    """The response when `time` forwards had run, to the end of the block of forward `step`."""
    end = (block_of_step(rollout, step) + 1) * rollout.block_size - len(rollout.prompt_ids)
    ids = np.array(rollout.token_ids[:end])
    for edit in reversed(rollout.edits):
        if edit.step >= time and edit.index < end:
            ids[edit.index] = edit.old_id
    first_commit = np.array(rollout.first_commit_step[:end])
    ids[(first_commit < 0) | (first_commit >= time)] = mask_id
    return ids
