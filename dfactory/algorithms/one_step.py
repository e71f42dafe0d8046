"""The likelihood of a response in one step, after d1: one view with the whole response masked."""

import dataclasses

import numpy as np

from dfactory.algorithms.rollouts import RolloutViews
from dfactory.noise import masked_view, view_positions
from dfactory.noise.schedules import Purpose, generator
from dfactory.types import AlignedDocument, View

PROMPT_MASK = 0.15  # d1


def all_masked(mask_id: int, seed: int) -> RolloutViews:
    """Views in which the response is masked, and each token of the prompt with probability PROMPT_MASK."""

    def views(document: AlignedDocument, index: int) -> tuple[AlignedDocument, list[View]]:
        rng = generator(seed, document.document_id, index, 0, Purpose.MASK)
        hidden_T = (rng.random(len(document.input_ids_T)) < PROMPT_MASK) & ~document.trainable_T
        ids_T = np.where(hidden_T, np.int32(mask_id), document.input_ids_T).astype(np.int32)
        shown = dataclasses.replace(document, input_ids_T=ids_T)
        position = view_positions(document)
        return shown, [masked_view(shown, position, document.trainable_T[position], np.ones(len(position)), mask_id)]

    return views
