"""CAP by hand, on the four targets of test_sft: one document, two views, beta 3."""

import pytest
import torch
from torch import nn

from dfactory.algorithms.cap import CAP
from dfactory.algorithms.sft import SFT
from dfactory.models.head import VocabularyHead
from tests.algorithms.test_sft import SCORES, batch

HITS = SCORES._replace(
    entropy_N=torch.tensor([0.5, 0.25, 1.0, 2.0], requires_grad=True), hit_N=torch.tensor([True, False, False, True])
)


def loss(terms) -> torch.Tensor:
    """As engine/window.py adds terms up, for a window of one micro-batch."""
    parts = [terms.weights.get(name, 1.0) * m.total / max(float(m.count), 1.0) for name, m in terms.loss.items()]
    return sum(parts)


def test_four_tokens():
    """NLL 10 / 4 targets, and 3 times the entropies 0.5 and 2.0 of the 2 correct ones: 2.5 + 3 x 1.25."""
    terms = CAP("uniform", confidence_beta=3.0)(batch(), HITS)
    assert terms.loss["nll"].total.item() == 10.0
    assert terms.loss["confidence"].total.item() == 2.5  # logged without beta
    assert terms.loss["confidence"].count == 2
    assert loss(terms).item() == 2.5 + 3 * 1.25


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_counts_equal_those_of_the_terms(weight):
    objective = CAP(weight)
    terms = objective(batch(), HITS)
    assert objective.counts(batch(), HITS) == {name: mean.count for name, mean in terms.loss.items()}
    assert terms.loss["nll"].count == SFT(weight).counts(batch())["nll"]


def test_without_a_correct_target_it_is_sft():
    none = HITS._replace(hit_N=torch.zeros(4, dtype=torch.bool))
    terms = CAP()(batch(), none)
    assert terms.loss["confidence"] == (0.0, 0)
    assert loss(terms).item() == 2.5


def test_the_entropy_gradient_runs_through_the_entropies_of_hits_only():
    """beta / hits at correct targets, 0 elsewhere; log-probabilities feel the NLL alone."""
    logprob, entropy = torch.autograd.grad(
        loss(CAP("uniform", confidence_beta=3.0)(batch(), HITS)), (HITS.logprob_N, HITS.entropy_N)
    )
    assert entropy.tolist() == [1.5, 0.0, 0.0, 1.5]
    assert logprob.tolist() == [-0.25] * 4


def test_through_the_head_it_equals_autograd_on_whole_logits():
    """The gradient at the hidden states, with the mask of correct targets a constant."""
    generator = torch.Generator().manual_seed(1)
    head = VocabularyHead.adopt(nn.Linear(6, 5, bias=False))
    head.weight.data = torch.randn(5, 6, generator=generator)
    hidden = torch.randn(4, 6, generator=generator, requires_grad=True)
    logits = hidden @ head.weight.T
    target = torch.cat([logits.argmax(1)[:2], logits.argmin(1)[2:]])  # two correct, two wrong

    terms = CAP("uniform", confidence_beta=3.0)(batch(), head(hidden, target, entropy_temperature=0.5))
    log_p, log_q = logits.log_softmax(1), (logits / 0.5).log_softmax(1)
    entropy = -(log_q.exp() * log_q).sum(1)
    expected = -log_p.gather(1, target[:, None]).mean() + 3.0 * entropy[:2].mean()
    torch.testing.assert_close(loss(terms), expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden)[0] for value in (loss(terms), expected)))
