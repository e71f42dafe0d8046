"""Loss weights by hand, on one document of six tokens in two views."""

import numpy as np
import pytest
import torch

from dfactory.algorithms.loss_weights import LOSS_WEIGHTS, cart
from dfactory.noise import masked_view
from dfactory.packing import PackedDocument, collate
from dfactory.types import AlignedDocument, ViewBatch

MASK = 9


def batch(split: bool = False) -> ViewBatch:
    """a b of a prompt, c d e f of a response; c and e are masked at t 0.5, then d at 0.25. `split`: a row for each view."""
    document = AlignedDocument(0, np.arange(6, dtype=np.int32), np.arange(6) >= 2, 6)
    position = np.arange(6, dtype=np.int32)
    views = [
        masked_view(document, position, np.isin(position, masked), np.full(6, t), MASK)
        for masked, t in (([2, 4], 0.5), ([3], 0.25))
    ]
    if split:
        return collate([[PackedDocument(document, [view])] for view in views], 1)
    return collate([[PackedDocument(document, views)]], 1)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "name, weights, count",
    [
        ("uniform", [1, 1, 1], 3),
        ("elbo", [2, 2, 4], 8),
        ("llada_sft", [0.5, 0.5, 1], 2),
        ("llada_pretraining", [2, 2, 4], 12),
        ("dream_original", [2, 2, 4], 3),
        ("dream_linear", [0.5, 0.5, 0.75], 3),
        ("dllm_token", [1 / 0.500001, 1 / 0.500001, 1 / 0.250001], 8),
        ("dllm_sequence", [0.25 / 0.500001, 0.25 / 0.500001, 0.25 / 0.250001], 2),
        ("dllm_batch", [1 / 0.500001, 1 / 0.500001, 1 / 0.250001], 2),
    ],
)
def test_weights_and_counts(name, weights, count, split):
    weight = LOSS_WEIGHTS[name]
    torch.testing.assert_close(weight.weigh(batch(split), 0.1), torch.tensor(weights, dtype=torch.float32))
    assert float(weight.count(batch(split))) == count


@pytest.mark.parametrize("split", [False, True])
def test_context_adaptive_weights(split, monkeypatch):
    """Visible in the first view: a b d f; in the second all but d."""
    q = 0.9
    expected = 0.05 * torch.tensor([q + 1 + 1 + q**2, q**3 + q**2 + 1 + 1, q**2 + q + 1 + 1 + q])
    torch.testing.assert_close(cart(batch(split), 0.1), expected)
    monkeypatch.setattr("dfactory.algorithms.loss_weights.TARGETS_AT_ONCE", 2)
    torch.testing.assert_close(cart(batch(split), 0.1), expected)


def test_no_targets_no_weights():
    assert all(weight.weigh(collate([[]], 1), 0.1).shape == (0,) for weight in LOSS_WEIGHTS.values())
