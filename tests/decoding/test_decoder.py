"""The batched, cached decoder against the obvious uncached loop, and its promises one by one."""

import collections
import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

import dfactory.decoding.decoder as decoder_module
from dfactory.decoding import DecodeRules, deciding, decode
from dfactory.decoding.cache import PaddedAttention
from dfactory.decoding.distribution import uniform_numbers
from dfactory.decoding.keys import DecodeKeys
from dfactory.decoding.response import Response
from dfactory.errors import ConfigError, DataError
from dfactory.models.registry import load_policy
from dfactory.types import GIVEN, EmbeddingInputs, FinishReason
from tests.decoding.conftest import EOS, MASK, Scripted, log_odds, same_rollouts, sharpen
from tests.decoding.uncached import Settings, block_causal_logits, budget, least, processed, uncached
from tests.models.conftest import CONFIGS

SUPPRESSED = (MASK, 150, 151, 157)


def make_rules(**keys) -> DecodeRules:
    keys = {"block_size": 8, "max_new_tokens": 24, "threshold": 0.5} | keys
    return DecodeRules.of(DecodeKeys(**keys), mask_token_id=MASK, eos_token_id=EOS, special_ids=SUPPRESSED)


def settings_of(rules: DecodeRules) -> Settings:
    names = {"threshold", "min_commit", "steps", "step_schedule"}
    return Settings(
        block_size=rules.block_size,
        max_new_tokens=rules.max_new_tokens,
        mask_token_id=rules.mask_token_id,
        eos_token_id=rules.eos_token_id,
        editing_threshold=rules.editing and rules.editing.threshold,
        max_post_steps=rules.editing.max_post_steps if rules.editing else 16,
        temperature=rules.distribution.temperature,
        top_k=rules.distribution.top_k,
        top_p=rules.distribution.top_p,
        acceptance=rules.acceptance.by,
        eos_penalty=rules.acceptance.eos_penalty,
        suppressed_ids=rules.distribution.suppressed_ids,
        **{name: value for name, value in vars(rules.rule).items() if name in names},
    )


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 150, (length,), generator=generator).tolist() for length in lengths]


def equals_uncached(policy, prompts, rules, drafts=None, choose=None):
    """Decode the prompts together; the obvious loop, one by one, has to say the same. Returns the rollouts."""
    rollouts = decode(policy, prompts, rules, drafts=drafts)
    for index, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):

        def noise(step, index=index):
            return uniform_numbers(rules.seed, index, step, rules.block_size)

        expected = uncached(policy, prompt, settings_of(rules), noise, drafts[index] if drafts else (), choose)
        assert rollout.prompt_ids == prompt
        assert rollout.token_ids == expected.token_ids
        assert rollout.output_ids == expected.output_ids
        assert rollout.commit_step == expected.commit_step
        assert rollout.first_commit_step == expected.first_commit_step
        assert rollout.edits == expected.edits
        assert rollout.block_size == rules.block_size
        assert rollout.block_forwards == expected.block_forwards
        assert rollout.forwards == expected.forwards
        assert rollout.commit_logprob == pytest.approx(expected.commit_logprob, abs=1e-4)
    return rollouts


LENGTHS = (3, 8, 13, 24)  # within a block, one block, ragged, three blocks


@pytest.mark.parametrize(
    "keys",
    [
        {"threshold": 0.95},
        {"threshold": 0.5},
        {"threshold": 0.3, "block_size": 16},
        {"threshold": 0.5, "block_size": 4, "min_commit": 3},
        {"threshold": 0.5, "block_size": 1},
        {"threshold": 0.4, "max_new_tokens": 5},
        {"threshold": 0.7, "editing_threshold": 0.5},
        {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 3},
        {"threshold": 0.5, "editing_threshold": 0.4, "max_post_steps": 0},
        {"threshold": 1.0, "steps": 3},
        {"threshold": 1.0, "steps": 4, "step_schedule": "ascending"},
        {"threshold": 0.6, "steps": 5, "step_schedule": "ascending", "temperature": 1.0, "acceptance": "top"},
        {"threshold": 0.7, "steps": 3, "step_schedule": "ascending", "editing_threshold": 0.5},
        {"threshold": 0.7, "temperature": 1.0},
        {"threshold": 0.7, "temperature": 0.7, "acceptance": "top", "top_k": 20},
        {"threshold": 0.6, "temperature": 1.3, "acceptance": "top", "top_p": 0.8},
        {"threshold": 0.6, "temperature": 1.0, "editing_threshold": 0.5, "top_k": 30, "top_p": 0.9},
        {"threshold": 0.6, "temperature": 1.0, "editing_threshold": 0.2, "acceptance": "top", "max_post_steps": 4},
        {"threshold": 0.6, "temperature": 1.0, "editing_threshold": 0.0, "acceptance": "top", "max_post_steps": 2},
    ],
    ids=str,
)
def test_equals_the_uncached_loop(policy, keys):
    rules = make_rules(**keys)
    rollouts = equals_uncached(policy, random_prompts(*LENGTHS), rules)
    if rules.editing is not None:
        assert sum(len(rollout.edits) for rollout in rollouts) > 10
    elif rules.block_size > 1:  # the case means something: some forwards commit one token, some several
        assert any(r.forwards < len(r.token_ids) for r in rollouts)


@pytest.mark.parametrize(
    "keys",
    [
        {"threshold": 0.5},
        {"threshold": 0.5, "block_size": 4, "batch_size": 2},
        {"threshold": 0.7, "editing_threshold": 0.5},
        {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 3, "batch_size": 2},
        {"threshold": 0.5, "editing_threshold": 0.4, "max_post_steps": 0},
        {"threshold": 0.6, "temperature": 1.0, "editing_threshold": 0.5},
    ],
    ids=str,
)
def test_drafts_equal_the_uncached_loop(policy, keys):
    """None, some tokens, holes, whole blocks without a mask, EOS in the middle, everything."""
    rules = make_rules(**keys)
    some, holes, blocks, ended, everything = random_prompts(5, 20, 19, 20, 24, seed=1)
    holes[2:4] = [MASK] * 2
    holes[17] = MASK
    ended[13] = EOS
    drafts = [[], some, holes, blocks, ended, everything]
    rollouts = equals_uncached(policy, random_prompts(8, 3, 13, 5, 24, 8), rules, drafts)
    still = rules.editing is None or rules.editing.max_post_steps == 0
    assert (rollouts[5].forwards == 0) == still
    if still:
        assert rollouts[5].token_ids == everything
        assert rollouts[3].token_ids[:19] == blocks
    if rules.editing is None:
        assert [rollouts[2].token_ids[i] for i in (0, 1, 4, 16)] == [holes[i] for i in (0, 1, 4, 16)]
    if not still:
        assert any(edit.old_id == everything[edit.index] for edit in rollouts[5].edits)


def test_a_draft_without_errors_takes_one_forward_a_block():
    """The model agrees with the draft: nothing is edited, and what was given says so."""
    policy = script_of({i: {f"t{i}": 0.9} for i in range(4, 9)} | {9: {f"t{EOS}": 0.9}})
    keys = {"block_size": 4, "max_new_tokens": 12, "editing_threshold": 0.5}
    draft = [4, 5, 6, 7, 8, EOS, 1, 1]
    (rollout,) = decode(policy, [[7] * 4], make_rules(**keys), drafts=[draft])
    assert (rollout.token_ids, rollout.output_ids, rollout.edits) == (draft, draft[:6], [])
    assert (rollout.forwards, rollout.block_forwards) == (2, [1, 1])
    assert rollout.commit_step == rollout.first_commit_step == [GIVEN] * 8
    policy.seen.clear()
    (repaired,) = decode(policy, [[7] * 4], make_rules(**keys), drafts=[[4, 9, 6, 7, 8, EOS, 1, 1]])
    assert repaired.output_ids == draft[:6]
    assert repaired.edits == [(1, 0, 9, 5)]
    assert repaired.commit_step == [GIVEN, 0, *[GIVEN] * 6]
    assert repaired.first_commit_step == [GIVEN] * 8


@pytest.mark.parametrize(
    "drafts, message",
    [
        ([[1]], "1 drafts for 2 prompts"),
        ([[], [160]], "draft 1 holds ids outside the model's vocabulary of 160"),
        ([[1] * 31, []], "draft 0 has 31 tokens, a response at most 30: raise max_new_tokens to 31"),
    ],
)
def test_drafts_that_cannot_be(policy, drafts, message):
    with pytest.raises(DataError, match=message):
        decode(policy, [[1, 2], [3]], make_rules(), drafts=drafts)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_other_families(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    policy = sharpen(load_policy(tmp_path, dtype="float32", init_weights="random"))
    keys = DecodeKeys(block_size=4, max_new_tokens=10, threshold=0.5, mask_token_id=95, eos_token_id=94)
    prompts = [[token % 90 for token in prompt] for prompt in random_prompts(2, 9)]
    equals_uncached(policy, prompts, DecodeRules.of(keys))


@pytest.mark.parametrize("keys", [{}, {"temperature": 1.0}, {"editing_threshold": 0.4, "max_post_steps": 2}], ids=str)
def test_32_ragged_prompts_equal_32_single_ones(policy, keys):
    rules = make_rules(max_new_tokens=20, **keys)
    lengths = random.Random(0)
    prompts = random_prompts(*(lengths.randint(1, 40) for _ in range(32)))
    fused = decode(policy, prompts, rules)
    same_rollouts(fused, [decode(policy, [p], rules, noise_ids=[i])[0] for i, p in enumerate(prompts)])


def test_finished_responses_give_their_slot_to_the_next_prompt(policy):
    rules = make_rules(temperature=1.0, threshold=0.4)
    prompts = random_prompts(5, 30, 8, 1, 17, 16, 2, 40, 9, 11)
    wide = decode(policy, prompts, rules)
    seen = []
    narrow = decode(
        policy, prompts, dataclasses.replace(rules, batch_size=4), on_step=lambda progress: seen.append(progress.prompt)
    )
    same_rollouts(narrow, wide)
    assert list(dict.fromkeys(seen)) == list(range(10))
    last_heard = {prompt: step for step, prompt in enumerate(seen)}
    assert seen.index(4) < max(last_heard[prompt] for prompt in range(4))  # others are still at work


def test_long_prompts_are_prefilled_in_chunks(policy, monkeypatch):
    rules = make_rules(block_size=4, max_new_tokens=8)
    prompts = random_prompts(41, 60, 3, 25)
    whole = decode(policy, prompts, rules)
    monkeypatch.setattr(decoder_module, "CLEAN_TOKENS", 16)
    monkeypatch.setattr(deciding, "LOGITS_BYTES", 1)
    longest = []
    hidden_at = policy.hidden_at
    monkeypatch.setattr(
        policy, "hidden_at", lambda n, ids, *rest: longest.append(ids.token.shape[1]) or hidden_at(n, ids, *rest)
    )
    same_rollouts(decode(policy, prompts, rules), whole)
    assert max(longest) <= 16 + 4 * 4


def test_blocks_longer_than_a_chunk(policy, monkeypatch):
    monkeypatch.setattr(decoder_module, "CLEAN_TOKENS", 4)
    equals_uncached(policy, random_prompts(20) * 2, make_rules(max_new_tokens=8))


def test_a_group_computes_its_prompt_once(policy, monkeypatch):
    rules = make_rules(temperature=1.0, batch_size=4)
    prompts = random_prompts(43) * 6 + random_prompts(16, seed=5) * 2
    single = [decode(policy, [p], rules, noise_ids=[i])[0] for i, p in enumerate(prompts)]
    positions = []
    hidden_at = policy.hidden_at
    monkeypatch.setattr(
        policy, "hidden_at", lambda n, ids, at, *rest: positions.extend(at[0].tolist()) or hidden_at(n, ids, at, *rest)
    )
    same_rollouts(decode(policy, prompts, rules), single)
    assert positions.count(3) == 2  # once a group


def test_prompts_that_are_embedded_otherwise_share_nothing(policy, monkeypatch):
    """Four equal prompts of five whole blocks; an input of the third one's embedding differs in one token of one block."""
    whole, asked = Response.embedding_inputs, []

    def inputs(response: Response, positions: slice) -> EmbeddingInputs:
        plain = whole(response, positions)
        noise = np.full(len(plain.token), -1)
        if response.index == 2 and positions.start == 0:
            noise[0] = 5
        return plain._replace(noise=noise)

    def hidden_at(n, inputs_1N, at, *rest):
        asked.extend(at[0].tolist())
        return plain_hidden_at(n, inputs_1N._replace(noise=None), at, *rest)

    plain_hidden_at = policy.hidden_at
    monkeypatch.setattr(policy, "hidden_at", hidden_at)
    prompts, rules = random_prompts(43) * 4, make_rules(max_new_tokens=8)
    decode(policy, prompts, rules)
    assert asked.count(3) == 1
    asked.clear()
    monkeypatch.setattr(Response, "embedding_inputs", inputs)
    decode(policy, prompts, rules)
    assert asked.count(3) == 2


@pytest.mark.parametrize("keys", [{}, {"editing_threshold": 0.6}], ids=["masks", "editing"])
def test_the_padded_attention_of_gpus_decodes_the_same(policy, monkeypatch, keys):
    prompts, rules = random_prompts(*LENGTHS, 60), make_rules(batch_size=3, **keys)
    expected = decode(policy, prompts, rules)
    made = []
    monkeypatch.setattr(
        decoder_module, "attend_spans", lambda *spans: made.append(PaddedAttention.of(*spans)) or made[-1]
    )
    same_rollouts(decode(policy, prompts, rules), expected)
    assert made


def test_a_list_without_prompts(policy):
    assert decode(policy, [], make_rules()) == []


def test_threshold_one_commits_one_token_a_forward(policy):
    for rollout in decode(policy, random_prompts(*LENGTHS), make_rules(threshold=1.0)):
        assert sorted(rollout.commit_step) == list(range(len(rollout.token_ids)))
        assert rollout.forwards == len(rollout.token_ids)


def test_never_stalls_and_never_emits_special_tokens(make_policy):
    """Even where the model would rather say mask or another special token than anything else."""
    policy = make_policy(seed=3)
    with torch.no_grad():
        policy.model.lm_head.weight[list(SUPPRESSED)] *= 20
    for keys in ({"threshold": 1.0}, {"temperature": 2.0}, {"editing_threshold": 0.0, "max_post_steps": 4}):
        rules = make_rules(**keys)
        for rollout in decode(policy, random_prompts(*LENGTHS), rules):
            assert not set(SUPPRESSED) & set(rollout.token_ids)
            assert rollout.forwards <= len(rollout.token_ids) + 4 * 5
            assert min(rollout.commit_step) >= 0


def replayed(policy, rollout, rules) -> list[float]:
    """What the one-pass model says of every token in the state that it was committed in."""
    start, settings = len(rollout.prompt_ids), settings_of(rules)
    steps = torch.tensor([-1] * start + rollout.commit_step)
    final = torch.tensor(rollout.prompt_ids + rollout.token_ids)
    logprob = {}
    with torch.inference_mode():
        for step in range(rollout.forwards):
            taken = (steps == step).nonzero()[:, 0].tolist()
            end = (taken[0] // rules.block_size + 1) * rules.block_size
            state = final.where(steps < step, torch.tensor(rules.mask_token_id))[:end]
            logits = block_causal_logits(policy, state, rules.block_size)
            logprob |= {i: processed(logits[i], settings)[final[i]].log().item() for i in taken}
    return [logprob[i] for i in range(start, len(final))]


def test_log_probabilities_are_those_of_the_processed_distribution(policy):
    rules = make_rules(temperature=0.8, top_k=40, top_p=0.95, acceptance="top", threshold=0.4)
    (prompt,) = random_prompts(13)
    (rollout,) = decode(policy, [prompt], rules)
    assert rollout.commit_logprob == pytest.approx(replayed(policy, rollout, rules), abs=1e-4)


def script_of(table: dict[int, dict], vocab_size: int = 160, otherwise: dict | None = None):
    """A scripted policy: at position i the token probabilities table[i]."""
    return Scripted(vocab_size, lambda i, _: log_odds(vocab_size, **table.get(i, otherwise or {"t1": 0.99})))


def test_the_prompt_is_never_masked_edited_or_scored():
    """A model that wants other tokens everywhere, and a prompt that ends inside a block."""
    policy = script_of({}, otherwise={"t1": 0.99})
    (rollout,) = decode(policy, [[7, 8, 9, 10, 11]], make_rules(block_size=4, max_new_tokens=6, editing_threshold=0.0))
    assert rollout.prompt_ids == [7, 8, 9, 10, 11]
    assert rollout.token_ids == [1] * 7
    assert rollout.output_ids == [1] * 6
    assert rollout.edits == []
    for ids, positions in policy.seen:
        assert all(token == 7 + i for token, i in zip(ids, positions, strict=True) if i < 5)


def test_the_finished_block_is_written_by_the_next_ones_first_pass():
    policy = script_of({i: {"t1": 0.6} for i in range(4, 8)})
    (rollout,) = decode(policy, [[7] * 8], make_rules(block_size=4, max_new_tokens=8, threshold=0.9))
    assert [positions for _, positions in policy.seen] == [list(range(12)), list(range(8, 16))]
    assert rollout.forwards == 2


def test_with_editing_the_last_pass_of_a_block_has_written_it():
    """It changes nothing, so its keys are those of the clean block."""
    policy = script_of({})
    (rollout,) = decode(
        policy, [[7] * 4], make_rules(block_size=4, max_new_tokens=8, threshold=0.9, editing_threshold=0.5)
    )
    first, second = list(range(4, 8)), list(range(8, 12))
    assert [p for _, p in policy.seen] == [list(range(8)), first, second, second]
    assert rollout.forwards == 4


def test_eos_ends_the_response_behind_its_block():
    policy = script_of({6: {f"t{EOS}": 0.99}})
    (rollout,) = decode(policy, [[7] * 3], make_rules(block_size=4, max_new_tokens=16))
    assert rollout.token_ids == [1, 1, 1, EOS, 1]
    assert rollout.output_ids == [1, 1, 1, EOS]
    assert rollout.finish_reason == FinishReason.EOS


def test_eos_waits_for_the_masks_before_it():
    policy = script_of({4: {"t1": 0.3}, 5: {"t1": 0.4}, 6: {f"t{EOS}": 0.99}, 7: {"t1": 0.2}})
    (rollout,) = decode(policy, [[7] * 4], make_rules(block_size=4, max_new_tokens=16, threshold=0.9))
    assert rollout.token_ids == [1, 1, EOS, 1]
    assert rollout.commit_step == [2, 1, 0, 3]


def test_eos_in_the_prompt_does_not_end_anything():
    (rollout,) = decode(script_of({}), [[EOS, 7, EOS]], make_rules(block_size=4, max_new_tokens=4))
    assert rollout.output_ids == [1] * 4
    assert rollout.finish_reason == FinishReason.LENGTH


def test_eos_beyond_the_longest_answer_is_no_end():
    """3 + 6 tokens fill three blocks of four; EOS stands at the eighth of nine decoded tokens."""
    policy = script_of({10: {f"t{EOS}": 0.99}})
    (rollout,) = decode(policy, [[7] * 3], make_rules(block_size=4, max_new_tokens=6))
    assert rollout.token_ids == [1] * 7 + [EOS, 1]
    assert rollout.output_ids == [1] * 6
    assert rollout.finish_reason == FinishReason.LENGTH


def test_editing_replaces_until_nothing_changes():
    """Position 3 says 1 for two forwards and 2 from then on: one edit, and one more forward that finds nothing."""
    policy = Scripted(160, lambda i, step: log_odds(160, t2=0.9) if i == 3 and step >= 2 else log_odds(160, t1=0.9))
    keys = {"block_size": 2, "max_new_tokens": 2, "threshold": 1.0, "max_post_steps": 5}
    (rollout,) = decode(policy, [[7, 7]], make_rules(editing_threshold=0.5, **keys))
    assert rollout.token_ids == [1, 2]
    assert rollout.edits == [(1, 2, 1, 2)]
    assert rollout.commit_step == [0, 2]
    assert rollout.commit_logprob[1] == pytest.approx(math.log(0.9 / (1 - 4 * 0.1 / 159)), abs=1e-5)
    assert rollout.forwards == 4

    policy.seen.clear()
    (off,) = decode(policy, [[7, 7]], make_rules(editing_threshold=None, **keys))
    assert (off.token_ids, off.forwards) == ([1, 1], 2)
    policy.seen.clear()
    (unsure,) = decode(policy, [[7, 7]], make_rules(editing_threshold=0.95, **keys))
    assert (unsure.token_ids, unsure.forwards) == ([1, 1], 3)


def test_post_steps_are_bounded():
    """A model that never agrees with itself."""
    policy = Scripted(160, lambda i, step: log_odds(160, **{f"t{step % 2}": 0.9}))
    rules = make_rules(block_size=2, max_new_tokens=4, editing_threshold=0.0, max_post_steps=3)
    (rollout,) = decode(policy, [[7, 7]], rules)
    assert rollout.forwards == 2 * (1 + 3)
    assert len(rollout.edits) == 2 * 2 * 3


def test_top_acceptance_keeps_the_distribution_and_sampled_starves_rare_tokens():
    """32 positions with p = (0.75, 0.25), threshold 0.7, whatever stands around them."""
    policy = Scripted(160, lambda i, step: log_odds(160, t1=0.7499, t2=0.2499))
    share = {}
    for acceptance in ("top", "sampled"):
        rules = make_rules(block_size=32, max_new_tokens=32, threshold=0.7, temperature=1.0, acceptance=acceptance)
        tokens = [token for rollout in decode(policy, [[7] * 32] * 40, rules) for token in rollout.token_ids]
        share[acceptance] = tokens.count(2) / len(tokens)
        policy.seen.clear()
    assert share["top"] == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 1280))
    assert share["sampled"] < 0.1


def edits_of(p_of: dict[str, float], count: int = 60, **keys) -> tuple[list, float]:
    """All edits of `count` responses to a model that says the same everywhere, and forwards a response."""
    odds = log_odds(160, **p_of)
    policy = Scripted(160, lambda i, step: odds)
    rules = make_rules(block_size=8, max_new_tokens=8, temperature=1.0, **keys)
    rollouts = decode(policy, [[7] * 8] * count, rules)
    return [edit for r in rollouts for edit in r.edits], sum(r.forwards for r in rollouts) / count


@pytest.mark.parametrize("acceptance", ["top", "sampled"])
@pytest.mark.parametrize("eos_penalty", [0.0, 0.9])
def test_an_edit_is_judged_by_the_token_that_it_writes(acceptance, eos_penalty):
    """Whatever is drawn, nothing below the threshold replaces a token; what was drawn at 0.1 is corrected."""
    keys = {"threshold": 0.5, "acceptance": acceptance, "eos_penalty": eos_penalty}
    edits, forwards = edits_of({"t1": 0.8999, "t2": 0.0999}, editing_threshold=0.5, **keys)
    assert {edit.new_id for edit in edits} <= {1}
    assert forwards < 3
    edits, _ = edits_of({"t1": 0.4, "t2": 0.35, "t3": 0.2}, editing_threshold=0.3, **keys)
    assert {edit.new_id for edit in edits} <= {1, 2}
    if acceptance == "top":  # what the top token is judged by: it never gives way, also at 0, "at any other argmax"
        for threshold in (0.3, 0.0):
            edits, _ = edits_of({"t1": 0.4, "t2": 0.35, "t3": 0.2}, editing_threshold=threshold, **keys)
            assert all(edit.old_id != 1 for edit in edits)
            assert edits


OPTIONS_OF_THREE = [
    {},
    {"steps": 2, "threshold": 1.0},
    {"steps": 2, "threshold": 1.0, "step_schedule": "ascending"},
    {"eos_penalty": 0.9},
    {"eos_penalty": 0.9, "steps": 2, "threshold": 0.8, "step_schedule": "ascending"},
]


def rules_of_three(**options) -> DecodeRules:
    """Blocks of three over the tokens 0, 1 and EOS, all of them in view of the prompt; 3 and 4 cannot come out."""
    keys = {"block_size": 3, "max_new_tokens": 3, "threshold": 0.5, "temperature": 1.0, "acceptance": "top"}
    ids = {"mask_token_id": 4, "eos_token_id": 2}
    return DecodeRules.of(DecodeKeys(**keys | options | ids, batch_size=500), special_ids=[3])


@pytest.fixture(scope="module")
def policy_of_three(make_policy):
    return make_policy(head=10.0, vocab_size=5, pad_token_id=3)


def enumerated(policy, prompt: list[int], rules: DecodeRules) -> tuple[collections.Counter, set]:
    """The probability of each of the 27 responses: the model's own product along the order in which the rules, which
    do not look at what was drawn, commit positions; and the sets of positions that were committed together."""
    settings = settings_of(rules)
    exact, together = collections.Counter(), set()

    def go_on(state, step, weight):
        masked = [i for i in range(3) if state[i] == 4]
        if not masked:
            exact[tuple(state)] += weight
            return
        p = [processed(z, settings) for z in block_causal_logits(policy, torch.tensor(prompt + state), 3)[3:]]
        factor = 1 - settings.eos_penalty * (1 - step / (budget(settings) - 1))
        sure = {i: p[i].max().item() * (factor if p[i].argmax() == 2 else 1) for i in masked}
        commit = [i for i in masked if sure[i] > settings.threshold]
        count = least(settings, len(masked), step)
        if len(commit) < count:
            commit = sorted(masked, key=sure.get, reverse=True)[:count]
        together.add((tuple(masked), tuple(sorted(commit))))
        for tokens in itertools.product(range(3), repeat=len(commit)):
            after, chance = list(state), weight
            for i, token in zip(commit, tokens, strict=True):
                after[i], chance = token, chance * p[i][token].item()
            go_on(after, step + 1, chance)

    with torch.inference_mode():
        go_on([4, 4, 4], 0, 1.0)
    return exact, together


@pytest.mark.parametrize("options", OPTIONS_OF_THREE, ids=str)
def test_top_acceptance_equals_the_enumerated_model(policy_of_three, options):
    """All 27 responses of three tokens over a vocabulary of three: frequencies against the model's own product.

    A penalty or a schedule chooses another order, and a model that is not consistent has another joint distribution
    under it. What stays: each token comes from the model's conditional distribution in the state that it was drawn in,
    and the product of the recorded probabilities is the probability of the response.
    """
    rules, prompt, count = rules_of_three(**options), [0, 1, 2], 4000
    exact, together = enumerated(policy_of_three, prompt, rules)
    assert bool(options) == (together != enumerated(policy_of_three, prompt, rules_of_three())[1])
    rollouts = decode(policy_of_three, [prompt] * count, rules)
    seen = collections.Counter(tuple(r.token_ids) for r in rollouts)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    chi_square = sum((seen[y] - count * p) ** 2 / (count * p) for y, p in exact.items())
    assert chi_square < 55  # 26 degrees of freedom: exceeded once in a thousand
    for rollout in {tuple(r.token_ids): r for r in rollouts}.values():
        assert math.exp(sum(rollout.commit_logprob)) == pytest.approx(exact[tuple(rollout.token_ids)], rel=1e-4)


@pytest.mark.parametrize("options", OPTIONS_OF_THREE, ids=str)
def test_recorded_log_probabilities_equal_replayed_ones(policy_of_three, options):
    rules, prompt = rules_of_three(**options), [0, 1, 2]
    rollouts = decode(policy_of_three, [prompt] * 20, rules)
    for rollout in rollouts:
        assert rollout.commit_logprob == pytest.approx(replayed(policy_of_three, rollout, rules), abs=1e-5)


@pytest.fixture(scope="module")
def eos_policy(make_policy):
    """A model that is often sure of EOS."""
    policy = make_policy()
    with torch.no_grad():
        policy.model.lm_head.weight[EOS] *= 4
    return policy


@pytest.mark.parametrize(
    "keys",
    [
        {"threshold": 0.6},
        {"threshold": 0.9, "min_commit": 2, "temperature": 1.0},
        {"threshold": 0.5, "temperature": 1.0, "acceptance": "top", "steps": 5, "step_schedule": "ascending"},
        {"threshold": 0.7, "editing_threshold": 0.5, "temperature": 0.7, "acceptance": "top"},
    ],
    ids=str,
)
def test_eos_penalty_equals_the_uncached_loop(eos_policy, keys):
    prompts = random_prompts(*LENGTHS, 5, 11)
    penalised = equals_uncached(eos_policy, prompts, make_rules(eos_penalty=0.8, **keys))
    plain = decode(eos_policy, prompts, make_rules(**keys))
    assert sum(EOS in rollout.token_ids for rollout in plain) > 2
    assert sum(a.commit_step != b.commit_step for a, b in zip(penalised, plain, strict=True)) > 2


def test_eos_waits_until_the_penalty_is_gone():
    """EOS is the surest at position 6, and comes last: 0.9 x (0.1, 0.4, 0.7, 1) against 0.4 to 0.6."""
    table = {4: {"t1": 0.6}, 5: {"t1": 0.5}, 6: {f"t{EOS}": 0.9}, 7: {"t1": 0.7}}
    keys = {"block_size": 4, "max_new_tokens": 4, "threshold": 1.0}
    (plain,) = decode(script_of(table), [[7] * 4], make_rules(**keys))
    (late,) = decode(script_of(table), [[7] * 4], make_rules(eos_penalty=0.9, **keys))
    assert (plain.commit_step, late.commit_step) == ([2, 3, 0, 1], [1, 3, 2, 0])
    assert plain.token_ids == late.token_ids == [1, 1, EOS, 1]
    assert plain.commit_logprob == pytest.approx(late.commit_logprob)


def test_the_penalty_of_top_acceptance_does_not_look_at_what_was_drawn():
    """Positions with p(EOS) from 0.6 to 0.675: many of the draws are other tokens, the steps are always the same."""
    table = {i: {f"t{EOS}": 0.5 + i / 40, "t1": 0.25} for i in range(4, 8)} | {5: {"t2": 0.45, f"t{EOS}": 0.4}}
    keys = {"block_size": 4, "max_new_tokens": 4, "threshold": 0.5, "temperature": 1.0, "eos_penalty": 0.9}
    top = decode(script_of(table), [[7] * 4] * 50, make_rules(acceptance="top", **keys))
    assert {tuple(r.commit_step) for r in top} == {(3, 0, 2, 1)}
    assert len({tuple(r.token_ids) for r in top}) > 10
    sampled = decode(script_of(table), [[7] * 4] * 50, make_rules(acceptance="sampled", **keys))
    assert len({tuple(r.commit_step) for r in sampled}) > 5


@pytest.mark.parametrize(
    "keys, counts",
    [
        ({"steps": 3}, [3, 3, 2]),
        ({"steps": 4, "step_schedule": "ascending"}, [1, 1, 2, 4]),
        ({"steps": 3, "step_schedule": "ascending"}, [1, 2, 5]),
        ({"steps": 8}, [1] * 8),
    ],
)
def test_steps_commit_exactly_their_counts_with_threshold_one(policy, keys, counts):
    """The first block of the second prompt begins with five prompt tokens: three masks are left for its steps."""
    rules = make_rules(threshold=1.0, temperature=1.0, acceptance="top", **keys)
    whole, ragged = decode(policy, random_prompts(8, 13), rules)
    steps = whole.step_in_block.reshape(-1, 8)
    assert all([int((row == step).sum()) for step in range(len(counts))] == counts for row in steps)
    assert whole.block_forwards == [len(counts)] * len(steps)
    assert ragged.block_forwards == [min(3, len(counts))] + [len(counts)] * (len(ragged.block_forwards) - 1)


def test_seeds(policy):
    prompts = random_prompts(9, 9)[:1] * 2
    rules = make_rules(temperature=1.0)
    first, second = decode(policy, prompts, rules)
    assert first.token_ids != second.token_ids
    assert decode(policy, prompts, rules) == [first, second]
    assert decode(policy, prompts[:1], rules, noise_ids=[1])[0].token_ids == second.token_ids
    assert decode(policy, prompts, dataclasses.replace(rules, seed=1))[0].token_ids != first.token_ids


def test_no_global_random_state_is_read(policy):
    rules = make_rules(temperature=1.0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    once = decode(policy, random_prompts(5), rules)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert decode(policy, random_prompts(5), rules) == once


def test_callback_hears_every_forward(policy):
    heard = collections.defaultdict(list)
    rules = make_rules(threshold=1.0)
    rollouts = decode(policy, random_prompts(5, 12), rules, on_step=lambda p: heard[p.prompt].append(p))
    for index, rollout in enumerate(rollouts):
        progress = heard[index]
        assert [p.forwards for p in progress] == list(range(1, rollout.forwards + 1))
        assert [p.rollout for p in progress] == [None] * (rollout.forwards - 1) + [rollout]
        assert progress[-1].token_ids == rollout.token_ids
        masks = [p.token_ids.count(MASK) for p in progress]
        assert masks[0] == (2 if index == 0 else 3)  # 8 - 5 and 8 - 4 positions, one of them committed
        assert masks[-1] == 0


def test_one_transfer_from_the_device_a_forward(policy, monkeypatch):
    calls = collections.Counter()
    to_host, hidden_at = torch.Tensor.cpu, policy.hidden_at
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: calls.update(cpu=1) or to_host(tensor))
    monkeypatch.setattr(policy, "hidden_at", lambda *args: calls.update(forward=1) or hidden_at(*args))
    decode(policy, random_prompts(5, 12), make_rules(temperature=1.0))
    assert calls["cpu"] == calls["forward"]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([5, MASK, 6], r"prompt 1 holds the mask token 159 at position 1"),
        ([5, 160], "prompt 1 holds ids outside the model's vocabulary of 160"),
        ([-1], "outside"),
        ([], "prompt 1 is empty"),
    ],
)
def test_prompts_that_cannot_be(policy, prompt, message):
    with pytest.raises(DataError, match=message):
        decode(policy, [[1, 2], prompt], make_rules())


def test_ids_outside_the_vocabulary(policy):
    with pytest.raises(ConfigError, match="mask_token_id 160 is outside the model's vocabulary of 160"):
        decode(policy, [[1]], dataclasses.replace(make_rules(), mask_token_id=160))
