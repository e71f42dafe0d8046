"""Loss weights by hand, on one document of six tokens in two views."""

import numpy as np
import pytest
import torch

from dfactory.algorithms.cap import CAP
from dfactory.algorithms.dpo import DPO
from dfactory.algorithms.loss_weights import LOSS_WEIGHTS, cart
from dfactory.algorithms.sft import SFT
from dfactory.noise import masked_view
from dfactory.packing import PackedDocument, collate
from dfactory.types import AlignedDocument, Objective, TokenScores, ViewBatch

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


def records(*numbered: tuple[int, float | None], context: bool = False) -> ViewBatch:
    """Documents by (number, weight), each with views and targets that its number decides; the sides of pairs in turn."""
    packed = []
    for number, weight in numbered:
        ids = np.arange(number, number + 6, dtype=np.int32)
        document, position = (
            AlignedDocument(number, ids, np.arange(6) >= 2, 1, real_length=6),
            np.arange(6, dtype=np.int32),
        )
        masked = np.isin(position, [2 + number % 3, 4]), np.isin(position, [3, 5][: 1 + number % 2])
        views = [masked_view(document, position, one, np.full(6, 0.5 / (1 + number)), 99) for one in masked]
        columns = {} if weight is None else {"weight_D": weight}
        packed.append(PackedDocument(document, views, 0, columns, scores_context=context))
    return collate([packed], 1)


def scores_of(batch: ViewBatch) -> TokenScores:
    """By document, view and token, so that a document has the same wherever it lies."""
    torch.manual_seed(0)
    table = torch.rand(3, 16, 16, 3)
    logprob_N = table[0, batch.target_ids_N, batch.document_id_D[batch.document_N], batch.view_N].neg()
    entropy_N = table[1, batch.target_ids_N, 0, 0]
    hit_N = table[2, batch.target_ids_N, 0, 0] > 0.4
    return TokenScores(logprob_N.requires_grad_(), entropy_N, hit_N, batch.target_ids_N, logprob_N.detach())


def loss_of(objective: Objective, batch: ViewBatch) -> torch.Tensor:
    """As the engine divides."""
    scores = scores_of(batch)
    terms, counts = objective(batch, scores), objective.counts(batch, scores)
    assert all(float(counts[name]) == float(mean.count) for name, mean in terms.loss.items())
    return sum(terms.weights.get(name, 1.0) * mean.total / float(counts[name]) for name, mean in terms.loss.items())


OBJECTIVES = {name: SFT(name) for name in LOSS_WEIGHTS} | {
    "context": SFT(context_loss_weight=0.5),
    "cap": CAP(confidence_beta=2.0),
    "dpo": DPO(sft_loss_coef=0.3),
    "ipo": DPO(loss_type="ipo"),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_record_of_weight_2_counts_as_two_records(objective):
    """Loss and counts, to the rounding of a sum in float32; other weights of the same ratio have the same loss."""

    def batch(*numbered):
        found = records(*numbered, context=getattr(objective, "context_loss_weight", 0) > 0)
        return found.with_columns(reference_elbo_D=found.document_id_D * -0.25)

    once, twice = ((1, 1.0), (2, 1.0)), ((3, 2.0), (4, 2.0))
    doubled = batch((1, None), (2, None), (3, None), (4, None), (3, None), (4, None))
    torch.testing.assert_close(loss_of(objective, batch(*once, *twice)), loss_of(objective, doubled))
    counts = objective.counts(batch(*once, *twice), scores_of(batch(*once, *twice)))
    assert {name: float(count) for name, count in counts.items()} == pytest.approx(
        {name: float(count) for name, count in objective.counts(doubled, scores_of(doubled)).items()}
    )
    half = batch((1, 0.25), (2, 0.25), (3, 0.5), (4, 0.5))
    torch.testing.assert_close(loss_of(objective, half), loss_of(objective, doubled))
    assert abs(loss_of(objective, doubled) - loss_of(objective, batch(*once, (3, 1.0), (4, 1.0)))) > 1e-4


def test_equals_a_loop_over_targets():
    """L = - sum of c w log p / sum of c, target by target."""
    batch = records((1, 0.5), (2, 3.0))
    scores, total, count = scores_of(batch), 0.0, 0.0
    for index in range(batch.num_targets):
        weight = {1: 0.5, 2: 3.0}[int(batch.document_id_D[batch.document_N[index]])]
        total, count = total - weight * scores.logprob_N[index].item(), count + weight
    assert loss_of(SFT("uniform"), batch).item() == pytest.approx(total / count, rel=1e-6)
    ones = records((1, 1.0), (2, 1.0))
    assert loss_of(SFT("elbo"), ones).equal(loss_of(SFT("elbo"), records((1, None), (2, None))))  # to the digit
