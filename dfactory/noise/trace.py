"""Views that are states of a decoder, rebuilt from its trace (docs/method.md#trace-likelihood).

A *transition* of a block is `stride` neighbouring forwards, taken as one: the view shows what was committed before them,
and its targets are the tokens that they committed. Its masks that came later stay masks without being targets.

    commit_step_T   2 0 0 1     stride 1    transition 0   [M] [M] [M] [M]   targets at 1 and 2
    token           a b c d                 transition 1   [M]  b   c  [M]   target at 3
                                            transition 2   [M]  b   c   d    target at 0
                                stride 2    transition 0   [M] [M] [M] [M]   targets at 1, 2 and 3
                                            transition 1   [M]  b   c   d    target at 0

With stride 1 the log-probabilities of a document's transitions add up to the log-likelihood of its trace; with a longer
one they are what a decoder would have to be sure of to take several steps at once. Steps count from the first forward of
each block, so one view holds a transition of every block.

With full attention the whole document is one block, and steps count over the response: later forwards saw the blocks of
earlier ones, so a view holds one transition. It shows masks at all that came later, to the end of the canvas.
"""

import dataclasses

import numpy as np

from dfactory.noise.mask import view_positions
from dfactory.noise.schedules import Purpose, draw_t, generator
from dfactory.types import NEVER, UNDECODED, AlignedDocument, Rollout, View


@dataclasses.dataclass(frozen=True)
class TraceViews:
    """Makes `num_views` views of a document, each with one transition of every response block, drawn uniformly.

    The weight of a target is the number of transitions of its block: the weighted sum over a view's targets is an unbiased
    estimate of the sum over all transitions. `stratified` lets the n-th view draw from the n-th part of every block.
    """

    mask_id: int
    seed: int
    stride: int = 1
    num_views: int = 1
    stratified: bool = False

    def __call__(self, document: AlignedDocument, visit: int) -> list[View]:
        counts = num_transitions(document, self.stride)
        views = []
        for number in range(self.num_views):
            rng = generator(self.seed, document.document_id, visit, number, Purpose.RATIO)
            slices = {"slice_index": number, "num_slices": self.num_views} if self.stratified else {}
            chosen = np.floor(draw_t(rng, len(counts), 0.0, 1.0, **slices) * counts).astype(np.int64)
            views.append(transition_view(document, chosen, self.stride, self.mask_id, weight=counts))
        return views


def every_transition(document: AlignedDocument, stride: int, mask_id: int) -> list[View]:
    """View j holds transition j of every block that has one, with weight 1: all targets of the document, each once."""
    counts = num_transitions(document, stride)
    return [
        transition_view(document, np.full(len(counts), j), stride, mask_id, weight=np.ones(len(counts)))
        for j in range(counts.max())
    ]


def num_transitions(document: AlignedDocument, stride: int) -> np.ndarray:
    """int64, for each response block in order: the forwards that committed something, over the stride, rounded up."""
    committed_T = np.where(document.commit_step_T == UNDECODED, -1, document.commit_step_T)
    steps = committed_T[view_positions(document)].reshape(-1, document.block_size).max(axis=1) + 1
    return -(-steps.astype(np.int64) // stride)


def transition_view(
    document: AlignedDocument, transition: np.ndarray, stride: int, mask_id: int, weight: np.ndarray
) -> View:
    """The view that holds of each response block the transition of that number, from 0; blocks that have no such are not
    in it. `transition` and `weight` have one number a response block."""
    here = np.repeat(transition < num_transitions(document, stride), document.block_size)
    position_P = view_positions(document)[here]
    first_P = np.repeat(transition * stride, document.block_size)[here]
    step_P = document.commit_step_T[position_P]
    masked_P = step_P >= first_P
    masked = (masked_P & document.trainable_T[position_P]).reshape(-1, document.block_size).sum(axis=1)
    response = document.trainable_T[position_P].reshape(-1, document.block_size).sum(axis=1)
    return View(
        position_P=position_P,
        input_ids_P=np.where(masked_P, np.int32(mask_id), document.view_ids_T[position_P]).astype(np.int32),
        target_P=masked_P & (step_P < first_P + stride),
        t_P=np.repeat(masked / response, document.block_size).astype(np.float32),
        elbo_weight_P=np.repeat(weight, document.block_size)[here].astype(np.float32),
        after_clean=True,
    )


# --- what each forward of a Rollout saw -------------------------------------------------------------------------------


def state_before(rollout: Rollout, step: int, mask_id: int) -> np.ndarray:
    """The response as forward `step` saw it, to the end of the block that it ran on: int64, masks included.

    `step` counts from 0 over the whole response. What that forward changed is where `state_after` differs.
    """
    return _state(rollout, step, step, mask_id)


def state_after(rollout: Rollout, step: int, mask_id: int) -> np.ndarray:
    """The response as forward `step` left it, to the end of the block that it ran on."""
    return _state(rollout, step, step + 1, mask_id)


def block_of_step(rollout: Rollout, step: int) -> int:
    """The block, counted from `block_origin`, that forward `step` ran on."""
    if not 0 <= step < sum(rollout.block_forwards):
        raise IndexError(f"step {step} of a rollout with {sum(rollout.block_forwards)} steps")
    decoded = int(np.searchsorted(np.cumsum(rollout.block_forwards), step, side="right"))
    return (len(rollout.prompt_ids) - rollout.block_origin) // rollout.block_size + decoded


def _state(rollout: Rollout, step: int, time: int, mask_id: int) -> np.ndarray:
    """The response when `time` forwards had run, to the end of the block of forward `step`."""
    end = (block_of_step(rollout, step) + 1) * rollout.block_size + rollout.block_origin - len(rollout.prompt_ids)
    ids = np.array(rollout.token_ids[:end])
    for edit in reversed(rollout.edits):
        if edit.step >= time and edit.index < end:
            ids[edit.index] = edit.old_id
    first_commit = np.array(rollout.first_commit_step[:end])
    ids[(first_commit == NEVER) | (first_commit >= time)] = mask_id
    return ids
