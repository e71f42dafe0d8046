"""What the decoder promises to any rule: the columns that it reads and no others, its memory, edits and remasking."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dfactory.config.keys import key
from dfactory.decoding import BlockDecoder, DecodeRules, decode, static
from dfactory.decoding.keys import DecodeKeys, trace_problem
from dfactory.decoding.rules.base import (
    CONFIDENCE,
    DIVERGENCE,
    ENTROPY,
    MARGIN,
    RULES,
    Column,
    Decision,
    DecodingRule,
    default_rule,
)
from dfactory.errors import ConfigError
from dfactory.noise import state_after, state_before
from dfactory.types import GIVEN
from tests.decoding.conftest import MASK, Scripted, log_odds, same_rollouts
from tests.decoding.test_decoder import make_rules, random_prompts


def with_rule(rule: DecodingRule, **keys) -> DecodeRules:
    return dataclasses.replace(make_rules(**keys), rule=rule)


def best(number_RB: torch.Tensor, masked_RB: torch.Tensor) -> torch.Tensor:
    """The mask with the largest number of each row that has masks."""
    number_RB = number_RB.masked_fill(~masked_RB, -torch.inf)
    first_RB = torch.zeros_like(masked_RB).scatter(-1, number_RB.argmax(dim=-1, keepdim=True), True)
    return first_RB & masked_RB


@dataclasses.dataclass(frozen=True)
class RemaskOnce(DecodingRule):
    """The surest mask; each block's forward number `at` masks the least sure of its tokens again."""

    name = "remask_once"
    reads = (CONFIDENCE, ENTROPY)
    revises = True

    at: int = key(3, "the forward that masks", low=1)

    def decide(self, forward) -> Decision:
        done_RB = forward.recall("done", 0.0)
        entropy_RB = forward[ENTROPY]
        remask_RB = best(entropy_RB, forward.editable_RB) & (forward.step_R == self.at)[:, None] & (done_RB == 0)
        done_RB = torch.maximum(done_RB, remask_RB.any(dim=-1, keepdim=True).float())
        return Decision(best(forward[CONFIDENCE], forward.masked_RB), None, remask_RB, {"done": done_RB})

    def most_steps(self, block_size: int) -> int:
        return block_size + 1


@pytest.mark.parametrize("keys", [{}, {"temperature": 1.0}, {"cuda_graphs": True}, {"editing_threshold": 0.6}], ids=str)
def test_a_token_that_is_masked_again_is_in_the_trace(policy, monkeypatch, keys):
    """What every forward saw is what the trace rebuilds; alone, in a batch and with fixed shapes the same comes out."""
    monkeypatch.setattr(static, "FEWEST_KEYS", 1)
    prompts, rules = random_prompts(3, 8, 13, 24, 11), with_rule(RemaskOnce(), batch_size=3, **keys)
    after: list[list[list[int]]] = [[] for _ in prompts]
    rollouts = decode(
        policy, prompts, rules, on_step=lambda progress: after[progress.prompt].append(progress.token_ids)
    )
    same_rollouts(rollouts, [decode(policy, [p], rules, noise_ids=[i])[0] for i, p in enumerate(prompts)])
    for rollout, states in zip(rollouts, after, strict=True):
        assert MASK not in rollout.token_ids
        masked_again = [edit for edit in rollout.edits if edit.new_id == MASK]
        blocks = sum(forwards > 4 for forwards in rollout.block_forwards)
        assert blocks - 1 <= len(masked_again) <= len(rollout.block_forwards)
        for step, state in enumerate(states):
            assert state_after(rollout, step, MASK).tolist() == state
            assert step == 0 or (state_before(rollout, step, MASK)[: len(states[step - 1])] == states[step - 1]).all()
        for edit in masked_again:
            assert rollout.first_commit_step[edit.index] < edit.step < rollout.commit_step[edit.index]
    if "editing_threshold" not in keys:
        full = [f for rollout in rollouts for f in rollout.block_forwards[1:]]
        assert set(full) == {9}  # eight tokens, one of them twice


@dataclasses.dataclass(frozen=True)
class Restless(DecodingRule):
    """The surest mask; and masks everything else again, for ever."""

    name = "restless"
    revises = True

    def decide(self, forward) -> Decision:
        return Decision(best(forward[CONFIDENCE], forward.masked_RB), None, forward.editable_RB)

    def most_steps(self, block_size: int) -> int:
        return 5


@pytest.mark.parametrize("keys", [{}, {"editing_threshold": 0.0, "max_post_steps": 3}], ids=str)
def test_the_last_forward_of_a_block_commits_what_is_left(policy, keys):
    for rollout in decode(policy, random_prompts(3, 8, 13), with_rule(Restless(), **keys)):
        assert MASK not in rollout.token_ids
        assert max(rollout.block_forwards) <= 5 + 3
        if not keys:
            assert rollout.block_forwards == [5] * len(rollout.block_forwards)


def test_a_rule_may_edit(policy):
    """A draft whose tokens the rule replaces where the model is surest, once."""

    @dataclasses.dataclass(frozen=True)
    class EditOne(RemaskOnce):
        name = "edit_one"

        def decide(self, forward) -> Decision:
            differs_RB = forward.editable_RB & (forward.proposal_RB.token != forward.tokens_RB)
            edit_RB = best(forward.proposal_RB.logprob, differs_RB) & (forward.step_R == 0)[:, None]
            return Decision(forward.masked_RB, edit_RB)

    draft = [5, 6, 7, MASK, MASK, 10, 11, 12]
    (rollout,) = decode(policy, random_prompts(8), with_rule(EditOne(), max_new_tokens=8), drafts=[draft])
    (edit,) = rollout.edits
    assert (edit.old_id, edit.step, rollout.token_ids[edit.index]) == (draft[edit.index], 0, edit.new_id)
    assert rollout.first_commit_step == [GIVEN] * 3 + [0, 0] + [GIVEN] * 3
    assert rollout.block_forwards == [1]


# --- columns ----------------------------------------------------------------------------------------------------------


def counting(calls: list[int]) -> DecodingRule:
    """Left to right, with a column that counts the positions that it is computed for."""

    def count(logprob_NV):
        calls.append(len(logprob_NV))
        assert torch.allclose(logprob_NV.exp().sum(-1), torch.ones(len(logprob_NV)))
        return torch.arange(len(logprob_NV), dtype=torch.float)

    @dataclasses.dataclass(frozen=True)
    class Counting(DecodingRule):
        name = "counting"
        reads = (Column("counted", "", count),)

        def commit(self, forward):
            return best(-forward.columns["counted"], forward.masked_RB)

    return Counting()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_columns_that_are_read_are_computed(policy, temperature):
    """Beside responses with the default rule in one batch, for the open positions of its own response alone."""
    calls: list[int] = []
    plain, counted = make_rules(temperature=temperature), with_rule(counting(calls), temperature=temperature)
    decoder = BlockDecoder(policy, 8, slots=3, capacity=48)
    first, second, third = random_prompts(8, 8, 8)
    for index, (prompt, rules) in enumerate([(first, plain), (second, counted), (third, plain)]):
        decoder.add(index, prompt, rules, noise_id=index)
    rollouts = {}
    while decoder.live:
        rollouts |= {heard.prompt: heard.rollout for heard in decoder.step() if heard.rollout}
    assert calls == [8 - step % 8 for step in range(rollouts[1].forwards)]
    assert np.array_equal(rollouts[1].step_in_block, np.tile(np.arange(8), len(rollouts[1].block_forwards)))
    alone = [decode(policy, [p], r, noise_ids=[i])[0] for i, (p, r) in enumerate([(first, plain), (second, counted)])]
    same_rollouts([rollouts[0], rollouts[1]], alone)


def columns_of(script, steps: int, *reads: Column, **keys) -> list[dict[str, float]]:
    """What a rule hears of position 0 of a block of two, of which it commits the other one at the last step."""
    heard: list[dict[str, float]] = []

    @dataclasses.dataclass(frozen=True)
    class Listening(DecodingRule):
        name = "listening"
        revises = True

        def decide(self, forward) -> Decision:
            values = {column.name: forward[column][0, 0].item() for column in reads}
            heard.append(values | {"before": forward.recall("confidence", -1.0)[0, 0].item()})
            return Decision(torch.zeros_like(forward.masked_RB), memory={"confidence": forward[CONFIDENCE]})

        def most_steps(self, block_size: int) -> int:
            return steps

    Listening.reads = (CONFIDENCE, *reads)
    rules = with_rule(Listening(), block_size=2, max_new_tokens=4, **keys)
    decode(Scripted(160, script), [[7, 7]], rules)
    return heard


def test_columns_by_hand():
    """p = (0.6, 0.3, 0.1) over three tokens; suppressed ones have no share in it."""
    odds = [-100.0] * 160
    odds[1], odds[2], odds[3], odds[MASK] = math.log(0.6), math.log(0.3), math.log(0.1), 5.0
    (first, _) = columns_of(lambda i, step: odds, 1, ENTROPY, MARGIN)
    entropy = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
    assert first["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert first["margin"] == pytest.approx(0.3, abs=1e-5)
    (warm, _) = columns_of(lambda i, step: odds, 1, ENTROPY, temperature=0.5)
    squares = [p / 0.46 for p in (0.36, 0.09, 0.01)]
    assert warm["entropy"] == pytest.approx(-sum(p * math.log(p) for p in squares), abs=1e-5)
    (sure, _) = columns_of(lambda i, step: odds, 1, ENTROPY, temperature=1.0, top_k=1)
    assert sure["entropy"] == 0


def test_a_block_is_compared_with_its_last_forward():
    """Two blocks of three forwards; p(1) is 0.5, 0.8, 0.8 in each."""
    p = [0.5, 0.8, 0.8]

    def script(position, step):
        return log_odds(160, t1=p[step % 3], t2=1 - p[step % 3] - 1e-9)

    heard = columns_of(script, 3, DIVERGENCE)
    moved = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    for first, second, third in (heard[:3], heard[3:]):
        assert first["divergence"] == math.inf
        assert second["divergence"] == pytest.approx(moved, abs=1e-4)
        assert third["divergence"] == pytest.approx(0, abs=1e-6)
        assert first["before"] == -1
        assert (second["before"], third["before"]) == pytest.approx((0.5, 0.8), abs=1e-4)


def test_another_rule_does_not_inherit_memory(policy):
    rules = with_rule(RemaskOnce(at=3))
    decoder = BlockDecoder(policy, 8, slots=1, capacity=32)
    decoder.add(0, random_prompts(8)[0], rules)
    for _ in range(4):
        decoder.step()
    assert decoder.live[0].memory["done"].max() == 1
    decoder.change_rules(0, with_rule(RemaskOnce(at=4)))
    assert not decoder.live[0].memory


# --- what a rule may not do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decision, message",
    [
        (lambda f: Decision(torch.zeros_like(f.masked_RB)), "decode.rule broken commits nothing in a block with masks"),
        (
            lambda f: Decision(f.masked_RB, None, f.editable_RB),
            "broken edits or remasks, but does not say that it revises",
        ),
    ],
)
def test_rules_that_break_their_word(policy, decision, message):
    @dataclasses.dataclass(frozen=True)
    class Broken(DecodingRule):
        name = "broken"

        def decide(self, forward):
            return decision(forward)

    with pytest.raises(ValueError, match=message):
        decode(policy, random_prompts(8), with_rule(Broken()))


def test_what_the_likelihood_of_a_trace_needs(monkeypatch):
    keys = DecodeKeys(acceptance="top")
    assert trace_problem(keys) is None
    edited = dataclasses.replace(keys, editing_threshold=0.5)
    assert trace_problem(edited) == ("decode.editing_threshold 0.5", "the likelihood of edits is not computed")
    rule = default_rule()
    monkeypatch.setattr(rule, "keeps_distribution", False)
    assert trace_problem(keys)[0] == f"decode.rule {rule.name}"
    assert "depend on what was drawn" in trace_problem(keys)[1]
    monkeypatch.setattr(rule, "revises", True)
    assert "takes back" in trace_problem(keys)[1]


# --- the table --------------------------------------------------------------------------------------------------------


def test_one_rule_is_the_default():
    assert sum(rule.is_default for rule in RULES) == 1
    assert DecodeKeys().rule == default_rule().name


def test_every_rule_says_what_it_does_and_shows_its_first_key():
    for rule in RULES:
        assert rule.__doc__.partition("\n")[0].endswith(".")
        assert all(field.metadata["help"] for field in dataclasses.fields(rule))
        shown = rule().shown
        assert shown == f"{rule.dial()} {getattr(rule(), rule.dial()):g}"


def test_an_unknown_rule_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"treshold: it must be one of .*; did you mean threshold"):
        DecodeRules.of(DecodeKeys(rule="treshold", block_size=8), mask_token_id=1, eos_token_id=2)
