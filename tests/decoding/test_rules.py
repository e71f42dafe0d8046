"""The decoding rules on cases of four tokens that a person can check."""

import math

import numpy as np
import pytest
import torch

from dfactory.config.decode import DecodeKeys
from dfactory.decoding.rules import DecodeRules, Distribution, Editing, Proposal, Threshold, uniform_numbers
from dfactory.errors import ConfigError


def proposal(token, p, top_p=None) -> Proposal:
    p = torch.tensor([p])
    return Proposal(torch.tensor([token]), p.log(), p.log() if top_p is None else torch.tensor([top_p]).log())


def yes(*flags) -> torch.Tensor:
    return torch.tensor([flags], dtype=torch.bool)


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]


@pytest.mark.parametrize(
    "distribution, expected",
    [
        (Distribution(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Distribution(1.0, suppressed_ids=(0,)), [0, 0.6, 0.3, 0.1]),
        (Distribution(0.5), [0.6849, 0.2466, 0.0616, 0.0068]),  # squares, normalised
        (Distribution(1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Distribution(1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Distribution(1.0, top_p=0.5), [1, 0, 0, 0]),
        (Distribution(1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Distribution(1.0, top_p=0.0), [1, 0, 0, 0]),
        (Distribution(1.0, top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Distribution(1.0, top_k=2, suppressed_ids=(0,)), [0, 2 / 3, 1 / 3, 0]),
    ],
)
def test_processed_distribution(distribution, expected):
    """A token comes out for as many of the evenly spread numbers as its probability says."""
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = distribution.propose(LOGITS.expand(count, -1), uniform)
    frequency = torch.bincount(drawn.token, minlength=4) / count
    torch.testing.assert_close(frequency, torch.tensor(expected, dtype=torch.float), atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn.logprob.exp(), torch.tensor(expected)[drawn.token].float(), atol=1e-4, rtol=0)
    assert drawn.top_logprob.exp().allclose(torch.tensor(float(max(expected))), atol=1e-4)


def test_draw_at_the_edges_never_takes_an_impossible_token():
    distribution = Distribution(1.0, suppressed_ids=(0, 3))
    uniform = torch.tensor([0.0, 1 - 2**-48], dtype=torch.float64)
    assert distribution.propose(LOGITS.expand(2, -1), uniform).token.tolist() == [1, 2]


def test_greedy_is_the_argmax_of_what_is_not_suppressed_under_the_plain_softmax():
    drawn = Distribution(0.0, top_k=1, top_p=0.1, suppressed_ids=(0,)).propose(LOGITS)
    assert drawn.token.tolist() == [1]
    assert drawn.logprob.exp().item() == pytest.approx(0.6)
    assert drawn.top_logprob.exp().item() == pytest.approx(0.6)


def test_propose_leaves_the_logits_alone():
    logits = LOGITS.clone()
    Distribution(0.0, suppressed_ids=(0,)).propose(logits)
    assert torch.equal(logits, LOGITS)


def test_bf16_logits_are_normalised_in_float32():
    drawn = Distribution().propose(LOGITS.bfloat16())
    assert drawn.logprob.dtype == torch.float32
    assert drawn.logprob.item() == LOGITS.bfloat16().float().log_softmax(-1).max().item()


def test_threshold_commits_all_above_it():
    rule = Threshold(0.95)
    committed = rule.commit(proposal([1, 1, 1, 1], [0.97, 0.60, 0.99, 0.20]), yes(1, 1, 1, 1))
    assert torch.equal(committed, yes(1, 0, 1, 0))


def test_threshold_falls_back_to_the_most_confident_masked_ones():
    confidence = proposal([1, 1, 1, 1], [0.50, 0.60, 0.30, 0.99])
    assert torch.equal(Threshold(0.95).commit(confidence, yes(1, 1, 1, 0)), yes(0, 1, 0, 0))
    assert torch.equal(Threshold(0.95, 2).commit(confidence, yes(1, 1, 1, 0)), yes(1, 1, 0, 0))
    assert torch.equal(Threshold(0.95, 2).commit(confidence, yes(0, 0, 1, 0)), yes(0, 0, 1, 0))
    assert torch.equal(Threshold(0.55, 2).commit(confidence, yes(1, 1, 1, 0)), yes(1, 1, 0, 0))
    assert torch.equal(Threshold(0.95).commit(confidence, yes(0, 0, 0, 0)), yes(0, 0, 0, 0))


def test_threshold_is_exceeded_not_reached_and_ties_go_to_the_left():
    assert torch.equal(Threshold(1.0).commit(proposal([1] * 4, [1.0] * 4), yes(0, 1, 1, 1)), yes(0, 1, 0, 0))


def test_rows_are_judged_one_by_one():
    p = torch.tensor([[0.97, 0.20], [0.30, 0.40]])
    both = Proposal(torch.ones(2, 2, dtype=torch.long), p.log(), p.log())
    assert Threshold(0.95).commit(both, torch.ones(2, 2, dtype=torch.bool)).tolist() == [[True, False], [False, True]]


def test_acceptance_looks_at_the_sample_or_at_the_top():
    rare_sample = proposal([1, 1, 1, 1], [0.01, 0.5, 0.5, 0.5], top_p=[0.99, 0.5, 0.6, 0.5])
    assert torch.equal(Threshold(0.9, acceptance="top").commit(rare_sample, yes(1, 1, 1, 1)), yes(1, 0, 0, 0))
    assert torch.equal(Threshold(0.9, acceptance="sampled").commit(rare_sample, yes(1, 1, 1, 1)), yes(0, 1, 0, 0))


def test_steps_of_a_block():
    assert Threshold(0.9, 1).most_steps(32) == 32
    assert Threshold(0.9, 3).most_steps(32) == 11


def test_min_commit_zero_is_refused():
    with pytest.raises(ConfigError, match="min_commit 0"):
        Threshold(0.9, 0)


def test_editing_replaces_other_tokens_that_are_sure():
    tokens = torch.tensor([[5, 6, 7, 8]])
    proposed = proposal([5, 9, 9, 9], [0.9, 0.9, 0.4, 0.9])
    assert torch.equal(Editing(0.5).edit(proposed, tokens, yes(1, 1, 1, 0)), yes(0, 1, 0, 0))
    assert torch.equal(Editing(0.0).edit(proposed, tokens, yes(1, 1, 1, 0)), yes(0, 1, 1, 0))


def test_noise_depends_on_seed_prompt_and_step_only():
    noise = uniform_numbers(3, 7, 5, 4)
    assert np.array_equal(noise, uniform_numbers(3, 7, 5, 4))
    others = [uniform_numbers(4, 7, 5, 4), uniform_numbers(3, 8, 5, 4), uniform_numbers(3, 7, 6, 4)]
    assert all(not np.intersect1d(noise, other).size for other in others)
    many = np.concatenate([uniform_numbers(0, prompt, 0, 100) for prompt in range(100)])
    assert 0 <= many.min() < many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(many)))


def test_rules_of_keys():
    keys = DecodeKeys(block_size=8, editing_threshold=0.0, max_post_steps=3, acceptance="top", min_commit=2)
    rules = DecodeRules.of(keys, mask_token_id=9, eos_token_id=7, special_ids=[5, 7])
    assert rules.distribution.suppressed_ids == (5, 9)
    assert rules.editing == Editing(0.0, 3, "top")
    assert rules.commit == Threshold(0.95, 2, "top")
    assert DecodeRules.of(DecodeKeys(block_size=8), mask_token_id=9, eos_token_id=7).editing is None


def test_keys_come_before_the_tokenizer():
    keys = DecodeKeys(block_size=8, mask_token_id=1, eos_token_id=2, suppress_special=False)
    rules = DecodeRules.of(keys, mask_token_id=9, eos_token_id=7, special_ids=[5])
    assert (rules.mask_token_id, rules.eos_token_id, rules.distribution.suppressed_ids) == (1, 2, ())


@pytest.mark.parametrize(
    "keys, ids, message",
    [
        (DecodeKeys(block_size=8), {"eos_token_id": 1}, "mask_token_id is null"),
        (DecodeKeys(block_size=8), {"mask_token_id": 1}, "eos_token_id is null"),
        (DecodeKeys(block_size=8), {"mask_token_id": 1, "eos_token_id": 1}, "must differ"),
        (DecodeKeys(), {"mask_token_id": 1, "eos_token_id": 2}, "block_size is null"),
    ],
)
def test_incomplete_rules(keys, ids, message):
    with pytest.raises(ConfigError, match=message):
        DecodeRules.of(keys, **ids)
