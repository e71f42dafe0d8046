"""One row [clean | view 1 | ... | view K] is K separate noisy ++ clean passes, for every family."""

import pytest
import torch

from dfactory.models import attention as attention_module
from dfactory.models.attention import MaskPlan
from dfactory.models.registry import load_policy
from tests.batches import Document, make_batch, random_document
from tests.models.conftest import CONFIGS, GOLDEN_DIR
from tests.reference import batch_scores, plain_scores, reference_model, step_mask

BLOCK = 4
PROMPTS = {24: 9, 16: 4, 20: 0}  # document length: prompt length


@pytest.fixture(params=["llada2_moe", *CONFIGS])
def policy(request, random_policy):
    if request.param == "llada2_moe":
        return load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32")
    return random_policy(request.param)


def documents(vocabulary: int, views: int = 3) -> list[Document]:
    g = torch.Generator().manual_seed(5)
    return [random_document(g, length, BLOCK, views, vocabulary, prompt) for length, prompt in PROMPTS.items()]


def one_pass(policy, document: Document, view: int):
    """Scores of one view through 2L tokens under the table's float mask and all logits."""
    noisy, target = document.views[view]
    length = len(document.ids)
    hidden = policy.hidden(
        torch.cat([noisy, document.ids])[None],
        torch.arange(length).repeat(2)[None],
        MaskPlan((step_mask(length, BLOCK) == 0)[:, 0]),
    )
    return plain_scores(policy.logits(hidden)[0, :length][target], document.ids[target])


def separate_passes(policy, documents):
    """log p of all targets, in the order of a composite row: documents, then views, then positions."""
    return [one_pass(policy, document, view) for document in documents for view in range(len(document.views))]


@pytest.mark.parametrize("implementation", ["dense", "segments"])
def test_a_composite_row_is_k_separate_passes(policy, implementation, monkeypatch):
    monkeypatch.setattr(attention_module, "DENSE_BELOW", 0)  # so that segments are used on short rows too
    policy.attn_implementation = implementation
    three = documents(policy.config.vocab_size)
    batch = make_batch([three[:2], three[2:]], row_length=130)  # both rows end in padding

    scores = policy(batch)
    expected = [torch.cat(part) for part in zip(*separate_passes(policy, three), strict=True)]
    torch.testing.assert_close(scores.logprob_N, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy_N, expected[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(scores.hit_N, expected[2])

    parameters = [p for p in policy.parameters() if p.requires_grad]
    got = torch.autograd.grad(scores.logprob_N.sum() / 50, parameters)
    want = torch.autograd.grad(expected[0].sum() / 50, parameters)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(policy):
    """Documents packed into one row, alone in their rows, or beside longer padding: the same scores."""
    three = documents(policy.config.vocab_size)
    with torch.no_grad():
        packed = policy(make_batch([three], row_length=300)).logprob_N
        alone = torch.cat([policy(make_batch([[document]])).logprob_N for document in three])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_the_reference_scores_the_same_batch():
    """The dense table, the expert loop and all logits of tests/reference.py on rows with several views and padding."""
    directory = GOLDEN_DIR / "llada2_tiny"
    batch = make_batch([documents(160)[:2], documents(160)[2:]], row_length=130)
    with torch.no_grad():
        scores = load_policy(directory, dtype="float32")(batch)
    expected = batch_scores(reference_model(directory), batch)
    torch.testing.assert_close(scores.logprob_N, expected.logprob, atol=5e-5, rtol=0)
    torch.testing.assert_close(scores.entropy_N, expected.entropy, atol=5e-5, rtol=0)
    assert torch.equal(scores.hit_N, expected.hit)


def test_a_document_longer_than_a_block_is_not_causal(policy):
    """A later token of the same block changes an earlier one's score, a token of the next block does not."""
    g = torch.Generator().manual_seed(1)
    document = random_document(g, 12, BLOCK, 1, policy.config.vocab_size, prompt=4)
    noisy, _ = document.views[0]
    target = torch.arange(12) == 4  # first position of block 1

    def score(changed: int):
        ids = noisy.clone()
        ids[changed] = (ids[changed] + 1) % (policy.config.vocab_size - 1)
        with torch.no_grad():
            return policy(make_batch([[Document(document.ids, [(ids, target)], BLOCK)]])).logprob_N.item()

    unchanged = policy(make_batch([[Document(document.ids, [(noisy, target)], BLOCK)]])).logprob_N.item()
    assert score(6) != pytest.approx(unchanged, abs=1e-4)
    assert score(8) == pytest.approx(unchanged, abs=1e-6)
