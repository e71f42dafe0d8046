"""Gaussian noise on the embedding of [M] during the first steps (docs/method.md#noise-on-mask-embeddings), or on all
embeddings at every step (NEFTune, arXiv 2310.05914).

An autoregressive model has never seen [M]: its embedding is small or arbitrary, and every mask looks the same. Noise that
differs from mask to mask steadies the first steps. As all noise here it is a value of the batch: which mask gets which
vector is a pure function of (seed, step, document id, view, position), so ranks, packing and resuming do not matter.

A batch carries the number of a row in a table of NOISE_TABLE_ROWS standard normal vectors, not the vectors; the policy
draws the table, which (seed, step) name. Two masks of a step share a vector with probability 1 / NOISE_TABLE_ROWS.
"""

import dataclasses
import math

import numpy as np
import torch

from dfactory.types import NOISE_TABLE_ROWS, PADDING, ViewBatch


@dataclasses.dataclass(frozen=True)
class MaskEmbeddingNoise:
    """Adds the noise of a step to a batch. The standard deviation falls from `std` at step 0 to 0 at step `steps`."""

    mask_id: int
    seed: int
    std: float
    steps: int

    def __call__(self, batch: ViewBatch, step: int) -> ViewBatch:
        std = self.std * max(0.0, 1 - step / self.steps)
        if std == 0:
            return batch
        here_RS = (batch.input_ids_RS == self.mask_id) & (batch.document_RS != PADDING)
        return _with_noise(batch, here_RS, self.seed, step, std)


@dataclasses.dataclass(frozen=True)
class TokenEmbeddingNoise:
    """Adds noise to all tokens of a batch, clean ones and views, at every step. NEFTune's is uniform in alpha / sqrt(L H)
    for L positions and H components; this one is normal with the same standard deviation, and L is the length of a packed
    sequence."""

    seed: int
    std: float

    @classmethod
    def of(cls, alpha: float, seed: int, row_length: int, hidden_size: int) -> "TokenEmbeddingNoise":
        return cls(seed, alpha / math.sqrt(3 * row_length * hidden_size))

    def __call__(self, batch: ViewBatch, step: int) -> ViewBatch:
        return _with_noise(batch, batch.document_RS != PADDING, self.seed, step, self.std)


def _with_noise(batch: ViewBatch, here_RS: torch.Tensor, seed: int, step: int, std: float) -> ViewBatch:
    if not here_RS.any():  # an empty row has no documents to name
        document_id_RS = torch.zeros_like(batch.document_RS)
    else:
        number_RS = batch.document_RS % len(batch.document_id_D)  # a trunk counts as its first document
        document_id_RS = batch.document_id_D[number_RS]
    hashed_RS = _mix(document_id_RS, batch.view_RS, batch.position_ids_RS, seed, step)
    row_RS = torch.from_numpy((hashed_RS % np.uint64(NOISE_TABLE_ROWS)).astype(np.int64))
    table_seed_1 = _mix(np.array([seed]), step) >> np.uint64(1)  # a number that int64 holds
    return batch.with_columns(
        embedding_noise_row_RS=torch.where(here_RS, row_RS, -1),
        embedding_noise_seed_1=torch.from_numpy(table_seed_1.astype(np.int64)),
        embedding_noise_std_1=torch.tensor([std], dtype=torch.float32),
    )


def _mix(first, *others) -> np.ndarray:
    """A hash of integers, elementwise: splitmix64's finaliser after each. uint64, of the shape of `first`."""
    state = np.zeros(np.shape(first), np.uint64)
    for value in (first, *others):
        state = state + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
