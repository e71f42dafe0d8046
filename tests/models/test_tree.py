"""A row whose documents share the beginning of their clean streams is the row in which each has its own."""

import numpy as np
import pytest
import torch

from dfactory.models import attention as attention_module
from dfactory.models.attention import SegmentPlan
from dfactory.models.registry import load_policy
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, align, collate, share
from dfactory.types import Example
from tests.models.conftest import GOLDEN_DIR
from tests.reference import batch_scores, dense_table, reference_model

BLOCK, MASK, EOS, TINY = 4, 159, 158, GOLDEN_DIR / "llada2_tiny"

# name: (prompt, lengths of the responses, positions saved)
FAMILIES = {
    "a pair": (13, [10, 7], 12),
    "a ragged group": (18, [3, 30, 11, 6, 17], 4 * 16),
    "a prompt that ends with a block": (12, [6, 9, 4], 2 * 12),
    "a prompt shorter than a block": (3, [6, 9, 5], 0),
    "one document": (13, [6], 0),
}


def family(prompt: int, responses: list[int], views: int = 2) -> list[PackedDocument]:
    draw = np.random.default_rng(prompt)
    make = RandomMask(MASK, seed=2, low=0.3, high=0.9, complementary=views == 2)
    common, packed = draw.integers(0, EOS, prompt), []
    for index, response in enumerate(responses):
        # the first tokens differ, so that nothing behind the prompt is in common by chance
        answer = np.concatenate([[index], draw.integers(0, EOS, response - 1)])
        ids = np.concatenate([common, answer]).astype(np.int32)
        document = align(Example(7, ids, np.arange(len(ids)) >= prompt), BLOCK, EOS)
        packed.append(PackedDocument(document, make(document, index)))
    return packed


def outcome(policy, batch):
    """Scores, and the gradients of the mean of log-probabilities, each target weighted."""
    scores = policy(batch)
    weight_N = torch.linspace(-1, 1, batch.num_targets)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return scores, torch.autograd.grad((weight_N * scores.logprob_N).mean(), parameters, allow_unused=True)


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY, dtype="float32")


@pytest.mark.parametrize("implementation", ["dense", "segments"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_and_gradients_are_those_of_rows_without_sharing(policy, name, implementation, monkeypatch):
    monkeypatch.setattr(attention_module, "DENSE_BELOW", 0)
    monkeypatch.setattr(policy, "attn_implementation", implementation)
    prompt, responses, saved = FAMILIES[name]
    documents, other = family(prompt, responses), family(9, [5, 8])
    tree = collate([[*share(documents), *share(other)], share(other)], BLOCK, pad_to=600)
    alone = collate([documents, other, other], BLOCK)
    assert alone.num_tokens - tree.num_tokens == saved + 2 * 8
    for field in ("document_id_D", "response_length_D", "num_views_D", "target_ids_N", "document_N", "view_N", "t_N"):
        assert torch.equal(getattr(tree, field), getattr(alone, field)), field

    scores, gradients = outcome(policy, tree)
    expected, expected_gradients = outcome(policy, alone)
    torch.testing.assert_close(scores.logprob_N, expected.logprob_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy_N, expected.entropy_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 16, 1000])
def test_segments_follow_the_table(chunk):
    """Chunk by chunk, who sees whom in a row with two trunks."""
    place = collate([[*share(family(13, [10, 7])), *share(family(9, [5, 8, 2]))]], BLOCK, pad_to=300).place_RS
    seen = torch.zeros(300, 300, dtype=torch.bool)
    for c in SegmentPlan.of(place, chunk).chunks_by_row[0]:
        keys = torch.arange(300)[c.keys]
        seen[c.queries.start : c.queries.stop, keys] = True if c.mask is None else c.mask
    token = place.document[0] >= 0
    assert torch.equal(seen[token], dense_table(*place)[0][token])


def test_the_reference_scores_a_tree(policy):
    batch = collate([share(family(13, [10, 7, 3]))], BLOCK)
    with torch.no_grad():
        expected = batch_scores(reference_model(TINY), batch)
        torch.testing.assert_close(policy(batch).logprob_N, expected.logprob, atol=5e-5, rtol=0)


def test_without_its_trunk_a_document_scores_otherwise(policy):
    """The equality above means something: what is shared is looked at."""
    batch = collate([share(family(13, [10, 7]))], BLOCK)
    with torch.no_grad():
        before = policy(batch).logprob_N
        batch.input_ids_RS[batch.document_RS == len(batch.document_id_D)] = 5
        after = policy(batch).logprob_N
    for document in range(2):
        here = batch.document_N == document
        assert (before[here] - after[here]).abs().max() > 1e-3
