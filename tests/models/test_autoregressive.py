"""Block size 1 with every token masked is next-token training: position i holds the mask, sees the clean tokens before it
and predicts token i. So a score is that of a plain causal pass over the clean prefix with the mask behind it."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, align, collate
from dfactory.types import Example
from tests.models.conftest import GOLDEN_DIR
from tests.reference import block_causal_mask, reference_model

LENGTH, PROMPT = 12, 3


@pytest.fixture(params=["qwen3", "llama", "llada2_moe"])
def family(request, random_policy, tmp_path):
    """(policy, causal logits of a row of ids): the latter by transformers' own attention, or by tests/reference.py."""
    if request.param == "llada2_moe":
        plain = reference_model(GOLDEN_DIR / "llada2_tiny")
        mask = block_causal_mask(LENGTH, 1)
        position = torch.arange(LENGTH)[None]
        policy = load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32")
        return policy, lambda ids_1T: plain(ids_1T, position[:, : ids_1T.shape[1]], mask[..., : ids_1T.shape[1], :][
            ..., : ids_1T.shape[1]
        ])  # fmt: skip
    policy = random_policy(request.param)
    (tmp_path / "saved").mkdir()
    save_policy(policy, tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    return policy, lambda ids_1T: model(ids_1T).logits


def block_1_batch(ids: np.ndarray, mask_id: int, **noise):
    example = Example(5, ids, np.arange(LENGTH) >= PROMPT)
    views = RandomMask(mask_id=mask_id, seed=1, **noise)
    document = align(example, block_size=1, eos_id=0)
    return collate([[PackedDocument(document, views(document, 0))]], block_size=1)


@torch.no_grad()
def test_a_score_is_that_of_a_causal_pass(family):
    policy, causal_logits = family
    mask_id = policy.config.vocab_size - 1
    ids = np.random.default_rng(0).integers(0, mask_id, LENGTH, dtype=np.int32)
    expected = []
    for i in range(PROMPT, LENGTH):
        row = torch.tensor([[*ids[:i].tolist(), mask_id]])
        expected.append(causal_logits(row)[0, -1].float().log_softmax(-1)[ids[i]])
    expected = torch.stack(expected)

    scores = policy(block_1_batch(ids, mask_id, low=1.0, high=1.0))
    torch.testing.assert_close(scores.logprob_N, expected, atol=2e-5, rtol=1e-5)

    # a complementary pair of any bandwidth has every token as a target once, with the same score
    pair = block_1_batch(ids, mask_id, low=0.3, high=0.8, complementary=True)
    order = pair.position_ids_RS.flatten()[pair.target_index_N].argsort()
    torch.testing.assert_close(policy(pair).logprob_N[order], expected, atol=2e-5, rtol=1e-5)
