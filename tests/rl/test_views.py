"""The views of rollouts: what their weighted sums estimate, against enumeration and against what a decoder recorded."""

import numpy as np
import pytest
import torch

from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.algorithms.rollouts import rollout_views
from dfactory.decoding import DecodeRules, decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.registry import load_policy
from dfactory.models.tiny import write_tiny_config
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, collate
from dfactory.recipe import Recipe
from dfactory.rl.rollouts import ScoredRollout
from dfactory.rl.rows import rollout_document
from dfactory.types import AlignedDocument, TokenScores, ViewBatch
from tests import enumerated
from tests.decoding.conftest import sharpen

DRAWS = 2000


def rows_of(documents: list[AlignedDocument], policy_loss: str, masks: RandomMask, **keys) -> ViewBatch:
    """One row with a rollout a document, of advantage 1 each, and old log-probabilities of 0."""
    make = rollout_views(Recipe(stage="rl", policy_loss=policy_loss, **keys), masks)
    packed = [PackedDocument(*make(document, 0)) for document in documents]
    batch = collate([packed], documents[0].block_size)
    number_D = torch.arange(len(documents))
    return batch.with_columns(
        advantage_D=torch.ones(len(documents)),
        rollout_D=number_D,
        share_D=torch.ones(len(documents)),
        old_logprob_N=torch.zeros(batch.num_targets),
    )


# --- ebpo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [3, 6])
@pytest.mark.parametrize(
    "noise, expected",
    [
        ({"low": 0.3, "high": 0.8, "num_views": 3}, enumerated.over_range(0.3, 0.8)),
        ({"low": 0.3, "high": 0.8, "complementary": True}, enumerated.over_pair(0.3, 0.8)),
        ({"low": 0, "high": 1, "num_views": 2, "stratified": True, "mask_count": "exact"}, enumerated.over_all_t),
    ],
    ids=["views", "pair", "exact"],
)
def test_the_mean_log_likelihood_of_ebpo_is_the_enumerated_elbo(block_size, noise, expected):
    """With weights clipped to 1, the objective's total is minus the sum of the log-ratios, here of log-likelihoods."""
    trainable = np.arange(enumerated.LENGTH) >= enumerated.PROMPT
    documents = [AlignedDocument(number, enumerated.IDS, trainable, block_size) for number in range(DRAWS)]
    batch = rows_of(documents, "ebpo", RandomMask(enumerated.MASK, seed=7, **noise))
    logprob_N = enumerated.scored(batch)
    other = torch.zeros(batch.num_targets)
    scores = TokenScores(logprob_N, other, other.bool(), other.long(), other)
    objective = PolicyGradient("sequence", normaliser="sum", epsilon=0.0, epsilon_high=0.0, clip="unconditional")
    total, count = objective(batch, scores).loss["policy"]
    assert count == DRAWS
    estimates = batch.sum_by_document(batch.elbo_weight_N * logprob_N)
    assert -total.item() / count == pytest.approx(estimates.mean().item(), rel=1e-4)
    difference = estimates.mean().item() - enumerated.enumerated(block_size, expected)
    assert abs(difference) < 3 * enumerated.standard_error(estimates)


# --- trace ------------------------------------------------------------------------------------------------------------

MASK, EOS = 159, 156  # of the random model


def test_the_likelihood_of_a_trace_is_what_the_decoder_recorded(tmp_path):
    """At temperature 1 and acceptance top; with special tokens not suppressed, as the learner's distribution has them."""
    policy = sharpen(load_policy(write_tiny_config(tmp_path), dtype="float32", init_weights="random"))
    keys = DecodeKeys(
        block_size=4,
        max_new_tokens=12,
        threshold=0.3,
        temperature=1.0,
        acceptance="top",
        suppress_special=False,
        mask_token_id=MASK,
        eos_token_id=EOS,
    )
    decoded = decode(policy, [list(range(5, 5 + length)) for length in (1, 3, 4, 9, 14)], DecodeRules.of(keys))
    rollouts = [rollout for rollout in decoded if MASK not in rollout.token_ids]
    assert sum(rollout.forwards < len(rollout.token_ids) for rollout in rollouts) > 1
    documents = [rollout_document(ScoredRollout(3, 0, rollout, 1.0, 1.0), 4) for rollout in rollouts]
    batch = rows_of(documents, "trace", RandomMask(MASK, seed=1, low=0.3, high=0.8))
    assert (batch.elbo_weight_N == 1).all()
    with torch.no_grad():
        sums_D = batch.sum_by_document(policy.score(batch).logprob_N)
    recorded = [sum(rollout.commit_logprob) for rollout in rollouts]
    np.testing.assert_allclose(sums_D.numpy(), recorded, rtol=1e-5)


# --- diffu_grpo -------------------------------------------------------------------------------------------------------


def test_diffu_grpo_masks_the_whole_response_and_a_part_of_the_prompt():
    trainable = np.arange(48) >= 30
    documents = [AlignedDocument(number, np.arange(48, dtype=np.int32), trainable, 8) for number in range(200)]
    make = rollout_views(Recipe(stage="rl", policy_loss="diffu_grpo"), RandomMask(MASK, seed=1, low=0.3, high=0.8))
    hidden = []
    for document in documents:
        shown, (view,) = make(document, 0)
        assert (view.input_ids_P[view.target_P] == MASK).all()
        assert view.position_P[view.target_P].tolist() == list(range(30, 48))
        assert view.position_P.tolist() == list(range(24, 48))  # the block where the prompt ends, too
        assert (view.elbo_weight_P[view.target_P] == 1).all()
        assert (view.input_ids_P[:6] == shown.input_ids_T[24:30]).all()
        assert (shown.input_ids_T[30:] == document.input_ids_T[30:]).all()
        hidden.append((shown.input_ids_T[:30] == MASK).mean())
    assert np.mean(hidden) == pytest.approx(0.15, abs=4 * np.sqrt(0.15 * 0.85 / (200 * 30)))
