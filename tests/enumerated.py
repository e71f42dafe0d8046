"""A model small enough that its ELBO can be enumerated over all masks.

It is a table: log p of the token at each position for every set of masked positions of its block, from a random softmax over
a vocabulary of 3. The document is 2 prompt tokens and 4 response tokens.
"""

import itertools
import math

import numpy as np
import torch

from dfactory.types import ViewBatch

VOCABULARY, PROMPT, LENGTH, MASK = 3, 2, 6, 3
IDS = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH).astype(np.int32)
TABLE = (2 * torch.randn(LENGTH, 2**LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))).log_softmax(-1)


def logprob(position: int, masked: tuple[int, ...]) -> float:
    """log p(token at `position` | exactly these positions of its block are masked)."""
    return TABLE[position, sum(2**i for i in masked), IDS[position]].item()


def scored(batch: ViewBatch) -> torch.Tensor:
    """The table's log-probability of every target of a batch."""
    position_N = batch.position_ids_RS.flatten()[batch.target_index_N]
    place = (batch.document_N * (int(batch.num_views_D.max()) + 1) + batch.view_N) * LENGTH
    block_N = place + batch.block_RS.flatten()[batch.target_index_N]
    code = torch.zeros(int(block_N.max()) + 1, dtype=torch.long).index_add(0, block_N, 2**position_N)
    return TABLE[position_N, code[block_N], batch.target_ids_N]


def enumerated(block_size: int, coefficient) -> float:
    """Sum over blocks, masked sets S and i in S of coefficient(n, |S|) log p(i | S)."""
    total = 0.0
    for start in range(0, LENGTH, block_size):
        response = range(max(start, PROMPT), start + block_size)
        for size in range(1, len(response) + 1):
            for masked in itertools.combinations(response, size):
                total += coefficient(len(response), size) * sum(logprob(i, masked) for i in masked)
    return total


def over_all_t(n: int, masks: int) -> float:
    """Integral of (1/t) t^l (1 - t)^(n - l) over [0, 1]: 1/l over the number of sets of size l."""
    return 1 / (masks * math.comb(n, masks))


def over_range(low: float, high: float):
    """The mean of (1/t) t^l (1 - t)^(n - l) over [low, high], by Gauss-Legendre quadrature."""
    node, weight = np.polynomial.legendre.leggauss(20)
    t = low + (high - low) * (node + 1) / 2
    return lambda n, masks: float((weight / 2 * t ** (masks - 1) * (1 - t) ** (n - masks)).sum())


def over_pair(low: float, high: float):
    one, twin = over_range(low, high), over_range(1 - high, 1 - low)
    return lambda n, masks: (one(n, masks) + twin(n, masks)) / 2


def standard_error(estimates: torch.Tensor) -> float:
    return (estimates.std() / math.sqrt(len(estimates))).item()
