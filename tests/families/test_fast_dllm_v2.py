"""Shifted logits over a block cache: Fast-dLLM v2's sampler token for token; leads, parts of blocks, early stops.

The golden `commit_step` counts all calls of the original, those that only fill the cache too, and is -1 at leads: the first
token of a block comes from the call that writes the block before. Here it is a step of its own.
"""

import numpy as np
import pytest
import torch

from dfactory.decoding import DecodeKeys, DecodeRules, decode
from dfactory.errors import ConfigError
from dfactory.models.registry import load_policy
from dfactory.noise import state_before
from dfactory.packing import PackedDocument, collate
from dfactory.types import NEVER, AlignedDocument, View
from tests.decoding.conftest import same_rollouts
from tests.decoding.uncached import block_causal_logits
from tests.families.cases import golden, policy_of
from tests.families.steps import batch_of, published_steps

NAME = "fast_dllm_v2"
CASES = {case["name"]: case for case in golden(NAME).expected["generations"]}
EACH = pytest.mark.parametrize("name", CASES)


def rules_of(case: dict, **keys) -> DecodeRules:
    """Its settings under the names here. It decodes max_new_tokens // block_length blocks and one token more."""
    size, prompt = case["block_length"], len(case["prompt"])
    end = (prompt // size + case["max_new_tokens"] // size) * size + 1
    special = {name: golden(NAME).expected[name] for name in ("mask_token_id", "eos_token_id")}
    given = {
        "block_size": size,
        "sub_block_size": case["small_block_length"],
        "sub_block_cache": case["use_block_cache"],
        "threshold": case["threshold"],
        "max_new_tokens": end - prompt,
        "early_stop": True,
        "suppress_special": False,
    }
    return DecodeRules.of(DecodeKeys(**special | given | keys))


def order(steps: list[int]) -> list[int]:
    """The rank of each commit among those that are not leads."""
    made = sorted({step for step in steps if step >= 0})
    return [made.index(step) if step >= 0 else -1 for step in steps]


@EACH
def test_the_original_sampler_token_for_token(name):
    case = CASES[name]
    (rollout,) = decode(policy_of(NAME), [case["prompt"]], rules_of(case))
    assert rollout.output_ids == case["output"]
    assert rollout.forwards == case["forwards"]
    size, prompt = case["block_length"], len(case["prompt"])
    steps = rollout.commit_step[: len(case["output"])]
    leads = [(prompt + index) % size == 0 for index in range(len(steps))]
    assert [step == -1 for step in case["commit_step"]] == leads
    assert order([-1 if lead else step for lead, step in zip(leads, steps, strict=True)]) == order(case["commit_step"])


@pytest.mark.parametrize("keys", [{}, {"cuda_graphs": True, "sub_block_cache": False}, {"batch_size": 3}])
def test_a_ragged_batch_equals_each_alone(keys):
    """With fewer slots than prompts, one prompt twice, and a prompt of whole blocks, whose lead comes from the prefill."""
    prompts = [case["prompt"] for case in CASES.values()]
    prompts.append(CASES["prompt_of_whole_blocks"]["prompt"])
    sampled = {"temperature": 1.0, "acceptance": "top", "max_new_tokens": 40, "threshold": 0.5, "early_stop": False}
    rules = rules_of(CASES["block_cache"], **sampled | keys)
    together = decode(policy_of(NAME), prompts, rules)
    alone = [decode(policy_of(NAME), [p], rules, noise_ids=[n])[0] for n, p in enumerate(prompts)]
    same_rollouts(together, alone)


def test_leads_are_steps_of_the_trace():
    """A view of the step before a lead holds the mask there; the steps of a block are its lead and its forwards."""
    case = CASES["prompt_of_whole_blocks"]
    rules = rules_of(case, early_stop=False, threshold=1.0, max_new_tokens=20)
    (rollout,) = decode(policy_of(NAME), [case["prompt"]], rules)
    assert rollout.block_forwards == [16, 16]
    assert rollout.forwards == 30
    assert sorted(rollout.step_in_block.tolist()) == sorted([*range(16)] * 2)
    assert [rollout.step_in_block[0], rollout.step_in_block[16]] == [0, 0]
    assert (state_before(rollout, 0, rules.mask_token_id) == rules.mask_token_id).all()
    seen = state_before(rollout, 17, rules.mask_token_id)
    assert seen.tolist() == [*rollout.token_ids[:17], *[rules.mask_token_id] * 15]


def test_the_mask_is_never_a_lead():
    """It may win where special tokens are not suppressed, and a lead has no second chance."""
    case = CASES["prompt_of_whole_blocks"]
    policy = load_policy(golden(NAME).directory, dtype="float32")
    rules = rules_of(case, early_stop=False, max_new_tokens=20)
    with torch.no_grad():
        head = policy.model.lm_head.weight
        head[rules.mask_token_id] = 50 * head[decode(policy, [case["prompt"]], rules)[0].token_ids[0]]
    (rollout,) = decode(policy, [case["prompt"]], rules)
    assert rules.mask_token_id not in (rollout.token_ids[0], rollout.token_ids[16])
    assert all(rollout.commit_step[index] != NEVER for index in (0, 16))


def test_the_recorded_log_probabilities_are_those_of_the_trace():
    """Each token's, of a lead too, is what a forward without a cache gives for the state before its step."""
    case, policy, shift = CASES["stop_one"], policy_of(NAME), 1
    rules = rules_of(case, temperature=1.0, acceptance="top", early_stop=False, max_new_tokens=20, threshold=0.2)
    (rollout,) = decode(policy, [case["prompt"]], rules)
    prompt = len(rollout.prompt_ids)
    for step in range(sum(rollout.block_forwards)):
        ids = torch.tensor([*rollout.prompt_ids, *state_before(rollout, step, rules.mask_token_id).tolist()])
        logprob = block_causal_logits(policy, ids, rules.block_size).log_softmax(-1)
        for index in [index for index, at in enumerate(rollout.commit_step) if at == step]:
            expected = logprob[prompt + index - shift, rollout.token_ids[index]].item()
            assert rollout.commit_logprob[index] == pytest.approx(expected, abs=1e-4)


def test_a_lead_may_be_all_that_is_left_of_an_answer():
    """With blocks of one token every token is a lead, and no forward has a mask in its input: autoregressive decoding."""
    case = CASES["stop_one"]
    (rollout,) = decode(policy_of(NAME), [case["prompt"]], rules_of(case, block_size=1, sub_block_size=None))
    ids = torch.tensor([*rollout.prompt_ids, *rollout.token_ids])
    greedy = block_causal_logits(policy_of(NAME), ids, 1).argmax(-1)
    assert rollout.forwards == 0
    assert rollout.token_ids == greedy[len(rollout.prompt_ids) - 1 : -1].tolist()


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"sub_block_size": 5}, r"decode.sub_block_size 5 does not divide block_size 16"),
        ({"sub_block_size": None, "sub_block_cache": True}, r"sub_block_cache true without decode.sub_block_size"),
        ({"sub_block_cache": True, "cuda_graphs": True}, r"sub_block_cache true with decode.cuda_graphs true"),
        (
            {"sub_block_cache": True, "editing_threshold": 0.5},
            r"sub_block_cache true with decode.editing_threshold 0.5",
        ),
    ],
)
def test_what_does_not_go_together(keys, said):
    with pytest.raises(ConfigError, match=said):
        rules_of(CASES["stop_one"], **keys)


def test_editing_leaves_leads_alone():
    """The block's own forward does not predict its first token, so nothing says what should stand there instead."""
    case = CASES["threshold_mid_small_blocks"]
    rules = rules_of(case, editing_threshold=0.0, early_stop=False, sub_block_cache=False)
    (rollout,) = decode(policy_of(NAME), [case["prompt"]], rules)
    assert rollout.edits
    assert all((len(rollout.prompt_ids) + edit.index) % 16 for edit in rollout.edits)


def test_a_view_of_the_response_alone_scores_as_a_view_of_everything():
    """Blocks before the response hold no noise, so their clean copies are what the view would hold there."""
    g = golden(NAME)
    (step,) = published_steps(g)
    whole = batch_of(g, step, ((0, 1),))
    parts = []
    for d in range(2):
        noisy_T, ids_T = (t[d].numpy().astype(np.int32) for t in (step.views[0].noisy_DL, g.input_ids))
        trainable_T = (g.labels[d] != -100).numpy()
        first = int(trainable_T.argmax()) // 16 * 16
        target_T = trainable_T & (noisy_T == g.expected["mask_token_id"])
        ones_P = np.ones(len(ids_T) - first, np.float32)
        view = View(np.arange(first, len(ids_T), dtype=np.int32), noisy_T[first:], target_T[first:], ones_P, ones_P)
        parts.append(PackedDocument(AlignedDocument(d, ids_T, trainable_T, 16), [view]))
    part = collate([parts], 16)
    assert part.num_tokens < whole.num_tokens
    with torch.no_grad():
        scored, alone = (policy_of(NAME)(batch).logprob_N for batch in (whole, part))
    torch.testing.assert_close(alone, scored[whole.view_N == 1], atol=1e-5, rtol=0)
