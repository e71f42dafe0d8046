"""Generations of families beside LLaDA2: token for token those of the original samplers.

DFACTORY_GOLDEN_DIR names another folder of golden files than tests/golden/families.
"""

import pytest

from dfactory.decoding import DecodeKeys, DecodeRules, decode
from tests.families.cases import golden, policy_of


@pytest.fixture(scope="module")
def dream():
    g = golden("dream")
    g.policy = policy_of("dream")
    return g


ORDERS = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy", "origin": "confidence"}


def timed_rules(dream, case: dict, **keys) -> DecodeRules:
    keys = {
        "rule": "timed",
        "time_order": ORDERS[case["alg"]],
        "time_steps": case["steps"],
        "time_end": case["eps"],
    } | keys
    return DecodeRules.of(
        DecodeKeys(max_new_tokens=case["max_new_tokens"], suppress_special=False, **keys).in_blocks_of(None),
        mask_token_id=dream.expected["mask_token_id"],
        eos_token_id=dream.expected["eos_token_id"],
        canvas=True,
    )


def deterministic_cases(expected: dict) -> list[dict]:
    return [case for case in expected["generations"] if case["name"] not in ("origin_seeded", "left_padded_batch")]


def test_generations_token_for_token(dream):
    """Of its own sampler, with the schedule of times as the decoding rule: the same tokens, at the same forwards."""
    cases = deterministic_cases(dream.expected)
    assert {case["alg"] for case in cases} == set(ORDERS)
    for case in cases:
        (rollout,) = decode(dream.policy, [case["prompt"]], timed_rules(dream, case))
        found = rollout.token_ids, rollout.forwards, rollout.commit_step
        assert found == (case["output"], case["forwards"], case["commit_step"]), case["name"]


def test_prompts_of_unequal_length_stand_alone(dream):
    """A batch of the original is padded on the left and shares its step counts; here each prompt is decoded as if alone."""
    (case,) = [case for case in dream.expected["generations"] if case["name"] == "left_padded_batch"]
    rollouts = decode(dream.policy, case["prompt"], timed_rules(dream, case))
    assert [rollout.token_ids for rollout in rollouts] == case["output"]
