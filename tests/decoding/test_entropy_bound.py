"""The entropy-bounded rule by hand, against a slow version of the whole loop, and beside other rules."""

import math

import pytest
import torch

from dfactory.decoding import DecodeRules
from dfactory.decoding.keys import DecodeKeys, load_decode_keys, trace_problem
from dfactory.decoding.rules.base import ENTROPY
from dfactory.decoding.rules.entropy_bound import EntropyBound
from dfactory.errors import ConfigError
from tests.decoding.test_decoder import LENGTHS, equals_uncached, make_rules, random_prompts
from tests.decoding.test_rules import forward_of, yes


def eb_rules(bound: float, **keys) -> DecodeRules:
    return make_rules(rule="entropy_bound", entropy_bound=bound, threshold=0.95, **keys)


def slowly(bound: float):
    """Take the most certain position, and the next one while those taken have no more than the bound together."""

    def choose(p_of: dict[int, torch.Tensor]) -> list[int]:
        entropy = {i: -sum(p * math.log(p) for p in p_V.tolist() if p > 0) for i, p_V in p_of.items()}
        left, taken = sorted(entropy, key=entropy.get), []
        while left and sum(entropy[i] for i in taken) <= bound:
            taken.append(left.pop(0))
        return taken

    return choose


@pytest.mark.parametrize(
    "bound, masked, expected",
    [
        (0.1, (1, 1, 1, 1), (1, 1, 0, 1)),
        (0.38, (1, 1, 1, 1), (1, 1, 1, 1)),
        (0.0, (1, 1, 1, 1), (0, 1, 0, 0)),
        (0.1, (1, 0, 1, 0), (1, 0, 0, 0)),
        (0.1, (0, 0, 0, 0), (0, 0, 0, 0)),
    ],
)
def test_by_hand(bound, masked, expected):
    forward = forward_of(yes(*masked), [0], {ENTROPY: [[0.30, 0.02, 0.50, 0.06]]})
    assert torch.equal(EntropyBound(bound).commit(forward), yes(*expected))


def test_rows_are_judged_one_by_one_and_certain_positions_cost_nothing():
    masked = torch.ones(2, 3, dtype=torch.bool)
    forward = forward_of(masked, [0, 5], {ENTROPY: [[0.0, 0.0, 0.0], [0.9, 0.8, 0.7]]})
    assert EntropyBound(0.0).commit(forward).tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize(
    "bound, keys",
    [
        (0.0, {}),
        (0.5, {}),
        (2.0, {"block_size": 4}),
        (1.0, {"temperature": 1.0}),
        (1.0, {"temperature": 0.7, "top_k": 20, "acceptance": "top"}),
        (1.0, {"editing_threshold": 0.5, "eos_penalty": 0.5}),
        (1.0, {"cuda_graphs": True, "batch_size": 2}),
    ],
    ids=str,
)
def test_equals_the_uncached_loop(policy, bound, keys):
    rollouts = equals_uncached(policy, random_prompts(*LENGTHS), eb_rules(bound, **keys), choose=slowly(bound))
    one_by_one = [len(set(r.first_commit_step)) == len(r.token_ids) for r in rollouts]
    assert all(one_by_one) == (bound == 0)


def test_keys_of_the_rule():
    rules = DecodeRules.of(
        load_decode_keys(["decode.rule=entropy_bound", "block_size=8", "mask_token_id=1", "eos_token_id=2"])
    )
    assert rules.rule == EntropyBound(0.1)
    assert rules.rule.shown == "entropy_bound 0.1"
    assert trace_problem(DecodeKeys(rule="entropy_bound", acceptance="top")) is None


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "rule=entropy_bound threshold=0.9",
            "threshold in the command line belongs to decode.rule threshold, and this is",
        ),
        (
            "entropy_bound=0.2",
            "entropy_bound in the command line belongs to decode.rule entropy_bound or renoise, and this is",
        ),
        ("rule=entropy_bound entropy_bound=-1", "entropy_bound -1.0 in the command line: it must be at least 0"),
        ("rule=entropy_bound eos_penalty=0.5", "eos_penalty 0.5 with decode.rule entropy_bound, which does not read"),
    ],
)
def test_keys_that_make_no_sense(words, message):
    with pytest.raises(ConfigError, match=message):
        load_decode_keys(words.split())
    load_decode_keys(["rule=entropy_bound", "threshold=0.95"])  # its default, as a run folder has it
