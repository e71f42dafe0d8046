"""Noise on mask embeddings: where it is, how large, and that it is a function of (seed, step, document, view, position)."""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dfactory.data.examples import DataReport, Examples
from dfactory.errors import ConfigError
from dfactory.models.registry import load_policy
from dfactory.noise import MaskEmbeddingNoise, RandomMask, TokenEmbeddingNoise
from dfactory.packing import PackedDocument, align, collate, share
from dfactory.recipe import load_recipe
from dfactory.types import NOISE_TABLE_ROWS, PADDING, AlignedDocument, Example, common_length
from tests.batches import TINY_SIZES
from tests.commands.conftest import ROOT

MASK, STD, STEPS = 95, 0.5, 4
LENGTHS = {7: 12, 8: 20, 9: 16}  # document id: tokens


def packed(document_id: int) -> PackedDocument:
    length = LENGTHS[document_id]
    ids = np.random.default_rng(document_id).integers(0, 90, length, dtype=np.int32)
    document = align(Example(document_id, ids, np.arange(length) >= 3), block_size=4, eos_id=90)
    return PackedDocument(document, RandomMask(MASK, seed=1, low=0.4, high=0.8, complementary=True)(document, visit=0))


def noise(seed: int = 3) -> MaskEmbeddingNoise:
    return MaskEmbeddingNoise(MASK, seed, STD, STEPS)


def mixed(*values: int) -> int:
    """splitmix64's finaliser after each value, in plain integers."""
    state, bits = 0, (1 << 64) - 1
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & bits
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & bits
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & bits
        state ^= state >> 31
    return state


def expected_vectors(batch, seed: int, step: int, std: float, hidden: int) -> torch.Tensor:
    """[R, S, H], position by position."""
    table = torch.randn(
        NOISE_TABLE_ROWS, hidden, generator=torch.Generator().manual_seed(mixed(seed, step) >> 1)
    )  # fmt: skip
    vectors = torch.zeros(*batch.input_ids_RS.shape, hidden)
    for r, s in (batch.input_ids_RS == MASK).nonzero().tolist():
        document = int(batch.document_id_D[batch.document_RS[r, s]])
        place = (document, int(batch.view_RS[r, s]), int(batch.position_ids_RS[r, s]))
        vectors[r, s] = std * table[mixed(*place, seed, step) % NOISE_TABLE_ROWS]
    return vectors


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3")
    (directory / "config.json").write_text(json.dumps(TINY_SIZES | {"model_type": "qwen3"}))
    return load_policy(directory, dtype="float32", init_weights="random", seed=1)


def added(policy, batch) -> torch.Tensor:
    """What the policy adds to the embeddings of the batch's tokens, [R, S, H]."""
    with torch.no_grad():
        embedded = policy._embedded(batch.embedding_inputs, policy._noise_table(batch))["inputs_embeds"]
        return embedded - policy.model.get_input_embeddings()(batch.input_ids_RS)


@pytest.mark.parametrize("step, std", [(0, STD), (1, STD * 3 / 4), (3, STD / 4)])
def test_the_policy_adds_these_vectors(policy, step, std):
    batch = collate([[packed(7), packed(8)], [packed(9)]], 4, pad_to=100)
    noised = noise()(batch, step)
    expected = expected_vectors(batch, seed=3, step=step, std=std, hidden=TINY_SIZES["hidden_size"])
    torch.testing.assert_close(added(policy, noised), expected, atol=1e-6, rtol=1e-5)

    seen = []
    hook = policy.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    scores = policy(noised)
    hook.remove()
    torch.testing.assert_close(seen[0], policy.model.get_input_embeddings()(batch.input_ids_RS) + expected)
    assert not torch.equal(scores.logprob_N, policy(batch).logprob_N)


def test_it_ends_and_then_nothing_is_different():
    batch = collate([[packed(7)]], 4)
    assert noise()(batch, STEPS) is batch
    assert noise()(batch, STEPS + 10) is batch
    empty = noise()(collate([[]], 4), 0)
    assert (empty.columns["embedding_noise_row_RS"] == -1).all()


def test_only_masks_have_it_and_padding_has_none():
    batch = collate([[packed(7), packed(8)]], 4, pad_to=120)
    padding = batch.document_RS == PADDING
    batch.input_ids_RS[padding] = MASK
    row_RS = noise()(batch, 0).columns["embedding_noise_row_RS"]
    assert torch.equal(row_RS >= 0, (batch.input_ids_RS == MASK) & ~padding)


def test_a_document_has_its_noise_wherever_it_stands():
    """In another row, beside others, behind padding: the batch and the rank do not matter."""
    together = noise()(collate([[packed(7), packed(8)], [packed(9)]], 4, pad_to=100), 1)
    for number, document_id in enumerate(LENGTHS):
        alone = noise()(collate([[packed(document_id)]], 4), 1)
        here = together.document_RS == number
        columns = (batch.columns["embedding_noise_row_RS"] for batch in (together, alone))
        assert torch.equal(*(row[batch == n] for row, batch, n in zip(
            columns, (together.document_RS, alone.document_RS), (number, 0), strict=True
        )))  # fmt: skip
        assert here.any()
        assert torch.equal(*(b.columns["embedding_noise_seed_1"] for b in (together, alone)))


def test_a_shared_clean_stream_has_the_noise_of_its_own_documents():
    """A mask in a prompt: the trunk counts as the first document, whose name the others bear, too."""
    first = packed(8)
    first.document.input_ids_T[1] = MASK
    tree, alone = (noise()(collate([row, [packed(9)]], 4), 1) for row in (share([first, first]), [first, first]))
    assert tree.num_tokens < alone.num_tokens
    rows = [batch.columns["embedding_noise_row_RS"][0, : first.cost] for batch in (tree, alone)]
    assert torch.equal(*rows)
    assert rows[0][1] >= 0


def test_documents_of_other_names_share_nothing(policy):
    """Their masks have other noise, in a prompt too (diffu_grpo masks it); a shared stream would have the first one's."""
    first = packed(8)
    first.document.input_ids_T[1] = MASK
    other = first._replace(document=dataclasses.replace(first.document, document_id=9))
    together, alone = (noise()(collate([row], 4), 1) for row in (share([first, other]), [first, other]))
    assert torch.equal(policy(together).logprob_N, policy(alone).logprob_N)


class Wider(NamedTuple):
    """The inputs of an embedding that takes a segment number besides."""

    token: Any
    noise: Any
    segment: Any


@pytest.mark.parametrize("field", Wider._fields)
@pytest.mark.parametrize("at, shared", [(None, 12), (11, 8), (8, 8), (7, 4), (0, 0)])
def test_whatever_enters_an_embedding_stops_sharing_where_it_differs(monkeypatch, field, at, shared):
    """Two sides of a pair that are alike but for one input of one token; blocks of 4, views of the last block."""
    ids, trainable = np.arange(16, dtype=np.int32), np.arange(16) >= 12
    documents = [align(Example(7, ids, trainable), 4, eos_id=90) for _ in range(2)]
    views = RandomMask(MASK, seed=1, low=1.0, high=1.0)
    packed = [PackedDocument(document, views(document, 0)) for document in documents]

    def inputs(changed: bool) -> Wider:
        made = Wider(ids.copy(), np.full(16, 7), np.zeros(16, np.int64))
        if changed and at is not None:
            getattr(made, field)[at] += 1
        return made

    inputs_of = {id(documents[1]): True}
    monkeypatch.setattr(AlignedDocument, "embedding_inputs", property(lambda d: inputs(id(d) in inputs_of)))
    assert share(packed)[1].shared == shared
    monkeypatch.setattr(Examples, "embedding_inputs", lambda _, index: inputs(index == 1))
    report = DataReport(["x"], unit_size=2)
    pair = Examples(report, np.array([7, 7]), np.array([0, 16, 32]), np.tile(ids, 2), np.tile(trainable, 2))
    assert pair.common_length_U.tolist() == [16 if at is None else at]


def test_an_input_that_only_one_has_is_a_difference():
    ids = np.arange(4)
    assert common_length(Wider(ids, None, None), Wider(ids, None, None)) == 4
    assert common_length(Wider(ids, None, None), Wider(ids, None, ids)) == 0


def test_mean_and_variance_and_no_correlation(policy):
    """Over 200 steps the components are standard normal times std, and two masks of a step are as two steps: unrelated."""
    batch = collate([[packed(8)]], 4)
    here = batch.input_ids_RS == MASK
    many = MaskEmbeddingNoise(MASK, 3, STD, 10**9)
    vectors = torch.stack([added(policy, many(batch, step))[here] for step in range(200)])  # [step, mask, component]
    assert vectors.mean().abs() < 0.01
    assert vectors.std().item() == pytest.approx(STD, rel=0.01)
    size = vectors[0, 0].numel()
    for one, other in [(vectors[:, 0], vectors[:, 1]), (vectors[1:, 0], vectors[:-1, 0])]:
        assert (one * other).mean().abs() / STD**2 < 4 / (len(one) * size) ** 0.5
    rows = many(batch, 0).columns["embedding_noise_row_RS"][here]
    assert len(rows.unique()) >= len(rows) - 1
    assert not torch.equal(rows, MaskEmbeddingNoise(MASK, 4, STD, 9)(batch, 0).columns["embedding_noise_row_RS"][here])


def test_noise_on_all_tokens_is_that_of_neftune():
    batch = collate([share([packed(7), packed(8)])], 4, pad_to=120)
    found = TokenEmbeddingNoise.of(10.0, seed=3, row_length=120, hidden_size=64)(batch, step=5)
    rows = found.columns["embedding_noise_row_RS"]
    assert torch.equal(rows >= 0, batch.document_RS != PADDING)
    assert len(rows[rows >= 0].unique()) > 0.8 * int((rows >= 0).sum())
    uniform = (2 * torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 1) * 10.0 / (120 * 64) ** 0.5
    assert found.columns["embedding_noise_std_1"].item() == pytest.approx(uniform.std().item(), rel=0.01)
    again, later = (TokenEmbeddingNoise(3, 0.1)(batch, step).columns["embedding_noise_row_RS"] for step in (5, 6))
    assert torch.equal(again, rows)
    assert not torch.equal(later, rows)


@pytest.mark.parametrize(
    "recipe, keys, told",
    [
        ("dpo", [], "neftune_noise_alpha 5 with stage dpo: likelihoods that are compared"),
        ("sft", ["mask_embedding_noise=0.1", "mask_embedding_noise_steps=9"], "a token gets one noise"),
        ("edit", [], "the model's own drafts would come from noise"),
    ],
)
def test_where_noise_on_all_tokens_has_no_meaning(recipe, keys, told):
    with pytest.raises(ConfigError, match=told):
        load_recipe(ROOT / f"recipes/quickstart/{recipe}.yaml", ["neftune_noise_alpha=5", *keys])
