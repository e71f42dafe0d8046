"""Keys of the decoder over several rules: what is valid where, on the command line, in requests and in recipes."""

import dataclasses

import pytest

from dfactory.decoding import DecodeRules
from dfactory.decoding.keys import DecodeKeys, decode_keys_over, load_decode_keys, trace_problem
from dfactory.decoding.rules.base import RULES
from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from tests.commands.conftest import ROOT

BOUNDED = {"rule": "entropy_bound"}


def test_the_group_has_the_keys_of_every_rule():
    names = [field.name for field in dataclasses.fields(DecodeKeys)]
    assert names[:2] == ["block_size", "max_new_tokens"]
    assert all(field.name in names for rule in RULES for field in dataclasses.fields(rule))
    assert len(set(names)) == len(names)


def test_a_request_may_change_the_rule():
    """What the server was started with for the former rule is no key of the request."""
    server = DecodeKeys(threshold=0.9, min_commit=2, temperature=0.5)
    asked = decode_keys_over(server, BOUNDED | {"entropy_bound": 0.3}, "the request")
    assert (asked.rule, asked.entropy_bound, asked.temperature) == ("entropy_bound", 0.3, 0.5)
    assert (asked.threshold, asked.min_commit) == (0.95, 1)
    back = decode_keys_over(asked, {"rule": "threshold", "threshold": 0.8}, "/rule")
    assert (back.threshold, back.entropy_bound) == (0.8, 0.1)
    assert decode_keys_over(asked, {"seed": 3}, "the request").entropy_bound == 0.3


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"entropy_bound": 0.3},
            "entropy_bound in the request belongs to decode.rule entropy_bound or renoise, and this is",
        ),
        (BOUNDED | {"steps": 4}, "steps in the request belongs to decode.rule threshold, and this is"),
        (BOUNDED | {"eos_penalty": 0.5}, "eos_penalty 0.5 with rule entropy_bound, which does not read the confidence"),
        ({"rule": "entropy"}, "rule entropy in the request: it must be one of .*did you mean entropy_bound"),
        ({"rule": 3}, "rule in the request: it must be str, is int"),
        ({"stop_token_ids": 3}, "stop_token_ids in the request: it must be a list of int, is 3"),
        ({"stop_token_ids": ["a"]}, r"stop_token_ids in the request: it must be a list of int, is \['a'\]"),
        ({"min_new_tokens": 513}, "min_new_tokens 513 > max_new_tokens 512"),
        (BOUNDED | {"defer_eos": True}, "defer_eos with rule entropy_bound, which does not read the confidence"),
    ],
)
def test_keys_of_a_request_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        decode_keys_over(DecodeKeys(), values, "the request")


def test_a_request_may_add_ids_that_end_a_response():
    assert decode_keys_over(DecodeKeys(), {"stop_token_ids": [3, 4]}, "the request").stop_token_ids == [3, 4]


def test_ends_and_guidance_that_cannot_be():
    ids = {"mask_token_id": 9, "eos_token_id": 7}
    with pytest.raises(ConfigError, match=r"decode\.stop_token_ids holds the mask 9"):
        DecodeRules.of(DecodeKeys(block_size=8, stop_token_ids=[9]), **ids)
    with pytest.raises(ConfigError, match=r"decode\.cfg_scale 1 and a model that decodes over a cache"):
        DecodeRules.of(DecodeKeys(block_size=8, cfg_scale=1.0), **ids)
    assert trace_problem(DecodeKeys(cfg_scale=1.0))[0] == "decode.cfg_scale 1"


def test_editing_reads_the_confidence_that_a_rule_does_not():
    load_decode_keys(["rule=entropy_bound", "eos_penalty=0.5", "editing_threshold=0.5"])


def test_a_recipe_may_select_a_rule():
    recipe = load_recipe(ROOT / "recipes/quickstart/rl.yaml", ["decode.rule=entropy_bound", "decode.threshold=0.95"])
    assert DecodeRules.of(dataclasses.replace(recipe.decode, block_size=16), mask_token_id=1, eos_token_id=2).rule == (
        RULES["entropy_bound"](0.1)
    )
    with pytest.raises(
        ConfigError, match=r"decode\.threshold in .*rl\.yaml belongs to decode.rule threshold, and this is"
    ):
        load_recipe(ROOT / "recipes/quickstart/rl.yaml", ["decode.rule=entropy_bound"])


def test_keys_made_in_python_are_checked_too():
    keys = DecodeKeys(rule="entropy_bound", threshold=0.5, block_size=8)
    with pytest.raises(ConfigError, match=r"threshold in DecodeKeys belongs to decode\.rule threshold"):
        DecodeRules.of(keys, mask_token_id=1, eos_token_id=2)
