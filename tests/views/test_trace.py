"""States rebuilt from a trace against those that the decoder really passed through."""

import collections

import pytest
import torch

from dfactory.config.decode import DecodeKeys
from dfactory.decoding import DecodeRules, decode
from dfactory.models.registry import load_policy
from dfactory.models.tiny import write_tiny_config
from dfactory.types import Edit, FinishReason, Rollout
from dfactory.views import block_of_step, state_after, state_before
from tests.decoding.conftest import sharpen

MASK, EOS = 159, 156  # of the random model


def recorded_states(policy, prompts, rules):
    """The rollouts, and for each of them the token ids that `on_step` told after every forward."""
    heard = collections.defaultdict(list)
    rollouts = decode(policy, prompts, rules, on_step=lambda p: heard[p.prompt].append(p.token_ids))
    return [(rollout, heard[index]) for index, rollout in enumerate(rollouts)]


def check_states(rollout: Rollout, after: list[list[int]], mask: int) -> None:
    """Every state before and after every forward, and the block that it ran on, by lengths and by what was heard."""
    known: list[int] = []  # the last state that was heard
    for step in range(rollout.forwards):
        end = len(after[step])  # of the block
        before = known + [mask] * (end - len(known))
        assert state_before(rollout, step, mask).tolist() == before, step
        assert state_after(rollout, step, mask).tolist() == after[step], step
        assert (block_of_step(rollout, step) + 1) * rollout.block_size == len(rollout.prompt_ids) + end
        known = after[step]
    assert known == rollout.token_ids
    with pytest.raises(IndexError):
        state_before(rollout, rollout.forwards, mask)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = write_tiny_config(tmp_path_factory.mktemp("model"))
    return sharpen(load_policy(directory, dtype="float32", init_weights="random"))


@pytest.mark.parametrize(
    "keys",
    [
        {"threshold": 0.9},
        {"threshold": 0.3, "block_size": 4, "min_commit": 2},
        {"threshold": 0.6, "temperature": 1.0, "acceptance": "top"},
        {"threshold": 0.7, "editing_threshold": 0.5},
        {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 3},
        {"threshold": 0.3, "editing_threshold": 0.1, "temperature": 1.0, "block_size": 4},
    ],
    ids=str,
)
def test_every_state_of_real_decoding(policy, keys):
    keys = {"block_size": 8, "max_new_tokens": 24, "mask_token_id": MASK, "eos_token_id": EOS} | keys
    rules = DecodeRules.of(DecodeKeys(**keys))
    pairs = recorded_states(policy, [list(range(5, 5 + length)) for length in (1, 3, 8, 13, 30)], rules)
    for rollout, after in pairs:
        check_states(rollout, after, MASK)
    edits = sum(len(rollout.edits) for rollout, _ in pairs)
    assert edits > 10 if "editing_threshold" in keys else edits == 0


def test_states_where_the_mask_may_be_emitted(policy, monkeypatch):
    """As LLaDA2's own code: a committed token may be edited back into the mask, and masks may be left."""
    weight = policy.model.lm_head.weight.detach().clone()
    weight[MASK] *= 3
    monkeypatch.setattr(policy.model.lm_head, "weight", torch.nn.Parameter(weight))
    keys = {"block_size": 8, "max_new_tokens": 32, "threshold": 0.0, "editing_threshold": 0.0, "max_post_steps": 3}
    keys |= {"temperature": 1.0, "suppress_special": False, "mask_token_id": MASK, "eos_token_id": EOS}
    kinds = collections.Counter()
    for min_commit in (1, 8):
        rules = DecodeRules.of(DecodeKeys(min_commit=min_commit, **keys))
        for rollout, after in recorded_states(policy, [[n, n + 1, n + 2] for n in range(12)], rules):
            check_states(rollout, after, MASK)
            kinds["to mask"] += sum(edit.new_id == MASK for edit in rollout.edits)
            kinds["from mask"] += sum(edit.old_id == MASK for edit in rollout.edits)
            kinds["left"] += rollout.token_ids.count(MASK)
    assert min(kinds["to mask"], kinds["from mask"], kinds["left"]) > 5, kinds


def test_the_example_of_the_docstring():
    """types.Rollout: a cat becomes a dog in the third forward."""
    a, cat, dog, ran, stop, eos, mask = range(10, 17)
    rollout = Rollout(
        prompt_ids=[1, 2],
        token_ids=[a, dog, ran, stop, eos, eos],
        commit_step=[0, 2, 5, 4, 4, 4],
        commit_logprob=[0.0] * 6,
        first_commit_step=[0, 1, 5, 4, 4, 4],
        edits=[Edit(1, 2, cat, dog)],
        block_size=4,
        block_forwards=[4, 3],
        output_ids=[a, dog, ran, stop, eos],
        forwards=7,
        finish_reason=FinishReason.EOS,
    )
    states = [state_before(rollout, step, mask).tolist() for step in range(7)]
    assert states == [
        [mask, mask],
        [a, mask],
        [a, cat],
        [a, dog],
        [a, dog, mask, mask, mask, mask],
        [a, dog, mask, stop, eos, eos],
        [a, dog, ran, stop, eos, eos],
    ]
    assert [block_of_step(rollout, step) for step in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    assert state_after(rollout, 3, mask).tolist() == [a, dog]
