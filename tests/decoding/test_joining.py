"""Responses that join and leave while others are decoded, each with its own rules: as if each were alone."""

import dataclasses

import pytest

from dfactory.decoding import BlockDecoder, DecodeRules, decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import ConfigError
from tests.decoding.conftest import EOS, MASK, same_rollouts
from tests.decoding.test_decoder import random_prompts

KEYS = (
    {"threshold": 0.5},
    {"threshold": 0.7, "editing_threshold": 0.5},
    {"threshold": 0.5, "temperature": 1.0, "seed": 7},
    {"threshold": 0.9, "max_new_tokens": 5},
    {"threshold": 0.6, "temperature": 0.8, "top_k": 20, "acceptance": "top"},
    {"threshold": 1.0, "steps": 4},
)


def make_rules(**keys) -> DecodeRules:
    keys = {"block_size": 8, "max_new_tokens": 24} | keys
    return DecodeRules.of(DecodeKeys(**keys), mask_token_id=MASK, eos_token_id=EOS)


def test_each_is_decoded_as_if_it_were_alone(policy):
    """Twelve requests of six kinds come one every second forward, into three slots."""
    requests = [(prompt, make_rules(**KEYS[i % 6])) for i, prompt in enumerate(random_prompts(*range(3, 39, 3)))]
    decoder = BlockDecoder(policy, 8, slots=3, capacity=64)
    waiting, rollouts, forwards, busiest = list(enumerate(requests)), {}, 0, 0
    while waiting or decoder.live:
        if waiting and decoder.free and forwards % 2 == 0:
            index, (prompt, rules) = waiting.pop(0)
            assert decoder.add(index, prompt, rules, noise_id=index) is None
        busiest = max(busiest, len(decoder.live))
        rollouts |= {heard.prompt: heard.rollout for heard in decoder.step() if heard.rollout}
        forwards += 1
    alone = [decode(policy, [prompt], rules, noise_ids=[i])[0] for i, (prompt, rules) in enumerate(requests)]
    same_rollouts([rollouts[i] for i in range(12)], alone)
    assert busiest == 3


def test_a_slot_that_is_given_up_is_free_at_once(policy):
    rules, (first, second, third) = make_rules(), random_prompts(9, 30, 12)
    decoder = BlockDecoder(policy, 8, slots=2, capacity=56)
    decoder.add(0, first, rules)
    decoder.add(1, second, rules)
    decoder.step()
    decoder.remove(1)
    decoder.add(2, third, rules)
    rollouts = {}
    while decoder.live:
        rollouts |= {heard.prompt: heard.rollout for heard in decoder.step() if heard.rollout}
    same_rollouts([rollouts[0], rollouts[2]], [decode(policy, [prompt], rules)[0] for prompt in (first, third)])
    assert 1 not in rollouts
    assert sorted(decoder.free) == [0, 1]


def test_progress_tells_drafts_and_what_is_settled(policy):
    heard = []
    (rollout,) = decode(policy, random_prompts(5), make_rules(threshold=0.6), on_step=heard.append)
    for progress in heard:
        pairs = list(zip(progress.token_ids, progress.draft_ids, strict=True))
        assert all(draft in (token, MASK) or token == MASK for token, draft in pairs)
        assert progress.token_ids[: progress.settled] == rollout.token_ids[: progress.settled]
        assert MASK not in progress.token_ids[: progress.settled]
        drafted = zip(progress.token_ids, progress.draft_logprobs, strict=True)
        assert all((logprob < 0) == (token == MASK) for token, logprob in drafted)
    assert [progress.settled for progress in heard] == sorted(progress.settled for progress in heard)
    assert heard[-1].settled == len(rollout.token_ids)
    assert any(MASK in progress.token_ids and MASK not in progress.draft_ids for progress in heard)


def test_rules_change_while_a_response_is_decoded(policy):
    """Threshold 1.0 commits one token a forward; 0.0 takes all that is left."""
    careful, hasty = make_rules(threshold=1.0), make_rules(threshold=0.0)
    decoder = BlockDecoder(policy, 8, slots=1, capacity=32)
    decoder.add(0, random_prompts(8)[0], careful)
    assert [sum(t != MASK for t in decoder.step()[0].token_ids) for _ in range(3)] == [1, 2, 3]
    decoder.change_rules(0, hasty)
    assert MASK not in decoder.step()[0].token_ids
    with pytest.raises(ConfigError, match="cannot change while"):
        decoder.change_rules(0, make_rules(max_new_tokens=9))


def test_what_there_is_no_room_for(policy):
    decoder = BlockDecoder(policy, 8, slots=1, capacity=32)
    with pytest.raises(ConfigError, match="takes 40 positions, a slot has 32"):
        decoder.add(0, [1] * 9, make_rules())
    with pytest.raises(ConfigError, match="block_size 4: this decoder has blocks of 8"):
        decoder.add(0, [1], dataclasses.replace(make_rules(), block_size=4))
    assert decoder.free == [0]
