"""The greedy generations of LLaDA2's own code on tests/golden, token for token, mask-to-token and with editing."""

import dataclasses
import json

import pytest

from dfactory.decoding import DecodeRules, decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.registry import load_policy
from dfactory.types import FinishReason
from tests.decoding.conftest import GOLDEN_DIR, same_rollouts

FILES = {
    name: json.loads((GOLDEN_DIR / name / "expected.json").read_text()) for name in ("llada2_tiny", "llada21_tiny")
}
CASES = [(name, case) for name, file in FILES.items() for case in range(len(file["generations"]))]
NO_EOS = 159  # an id that these models never emit


@pytest.fixture(scope="module")
def policies():
    return {name: load_policy(GOLDEN_DIR / name, dtype="float32") for name in FILES}


def rules_of(name: str, case: dict) -> DecodeRules:
    keys = DecodeKeys(
        block_size=case["block_length"],
        max_new_tokens=case["gen_length"],
        threshold=case["threshold"],
        editing_threshold=case.get("editing_threshold"),
        max_post_steps=case.get("max_post_steps", 16),
        suppress_special=False,
    )
    file = FILES[name]
    return DecodeRules.of(keys, mask_token_id=file["mask_token_id"], eos_token_id=file["eos_token_id"])


@pytest.mark.parametrize("name, number", CASES)
def test_tokens(policies, name, number):
    case = FILES[name]["generations"][number]
    (rollout,) = decode(policies[name], [case["prompt"]], rules_of(name, case))
    assert rollout.output_ids == case["output"]
    ends_with_eos = case["output"][-1] == FILES[name]["eos_token_id"]
    assert rollout.finish_reason == (FinishReason.EOS if ends_with_eos else FinishReason.LENGTH)


@pytest.mark.parametrize("name, number", CASES)
def test_forwards(policies, name, number):
    """As many denoising forwards as the original loop, although the cache is written on the way.

    That loop was run without early stopping: it decoded all blocks and cut at EOS afterwards. So must we to compare.
    """
    case = FILES[name]["generations"][number]
    rules = dataclasses.replace(rules_of(name, case), eos_token_id=NO_EOS)
    (rollout,) = decode(policies[name], [case["prompt"]], rules)
    assert rollout.forwards == case["forwards"]
    assert rollout.output_ids[: len(case["output"])] == case["output"]


def test_all_cases_in_one_batch(policies):
    """Prompts of 5 to 21 tokens together, under the rules of the second case; each as if alone."""
    for name, file in FILES.items():
        rules = rules_of(name, file["generations"][1])
        prompts = [case["prompt"] for case in file["generations"]]
        same_rollouts(decode(policies[name], prompts, rules), [decode(policies[name], [p], rules)[0] for p in prompts])


def test_a_committed_mask_uses_up_the_steps_of_its_block(policies):
    """Without suppression the mask itself can win. The block then ends after as many forwards as it has tokens."""
    name, case = "llada2_tiny", FILES["llada2_tiny"]["generations"][1]
    (rollout,) = decode(policies[name], [case["prompt"]], rules_of(name, case))
    left = [i for i, token in enumerate(rollout.token_ids) if token == FILES[name]["mask_token_id"]]
    assert left
    assert all(rollout.commit_step[i] == -1 and rollout.commit_logprob[i] == 0 for i in left)
