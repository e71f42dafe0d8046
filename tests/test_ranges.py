"""Ranges of token ids for other modalities: what they are, in text, in scores, in answers, and in a run of a few steps."""

import dataclasses
import json

import pytest
import torch

from data_tools import make_grid_data
from dfactory.data.records import Completion, Conversation
from dfactory.decoding import DecodeKeys, DecodeRules, decode
from dfactory.errors import ConfigError
from dfactory.models.families.base import FAMILIES
from dfactory.models.registry import known_ranges, load_policy
from dfactory.models.saving import save_policy
from dfactory.models.tiny import TINY_DIR, write_tiny_config
from dfactory.ranges import NO_RANGES, TokenRanges
from dfactory.recipe import load_recipe
from dfactory.vocabulary import read_vocabulary
from tests.commands.conftest import ROOT, dfactory
from tests.decoding.conftest import EOS, MASK, sharpen

RANGES = TokenRanges.of({"action": [3, 6], "image": [8, 10]}, "a test")
RECIPE = ROOT / "recipes/actions/sft.yaml"


def test_groups_layouts_and_text():
    assert RANGES.group_of(torch.arange(11)).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 0]
    others = RANGES.others(torch.tensor([1, 0]), slice(2, 7))
    assert others.tolist() == [[True, False, False, False, True], [False, True, True, True, False]]
    assert RANGES.layout("text*2, action*2,image", 6) == (0, 0, 1, 1, 2, 2)
    assert RANGES.layout("action*9", 2) == (1, 1)
    assert RANGES.layout(None, 4) == ()
    assert RANGES.split("a<|action_2|><|image_0|> b") == ["a", 5, 8, " b"]
    assert RANGES.split("<|action_3|><|action_02|><|sound_0|>") == ["<|action_3|><|action_02|><|sound_0|>"]
    assert RANGES.written([1, 2, 5, 8, 0], lambda ids: f"{ids}") == "[1, 2]<|action_2|><|image_0|>[0]"
    assert NO_RANGES.written([1], str) == "[1]"
    assert RANGES.stated == {"action": [3, 6], "image": [8, 10]}


@pytest.mark.parametrize(
    "stated, said",
    [
        ({"action": [3, 6], "image": [5, 9]}, r"token_ranges.action \[3, 6\] and token_ranges.image \[5, 9\] overlap"),
        ({"action": [6, 3]}, r"token_ranges.action \[6, 3\] in here: it must be \[start, stop\]"),
        ({"action": 3}, "token_ranges.action 3 in here: it must be"),
        ({"text": [3, 6]}, "token_ranges.text in here: a name has small letters"),
        ({"Action": [3, 6]}, "token_ranges.Action in here"),
    ],
)
def test_what_is_no_range_is_refused(stated, said):
    with pytest.raises(ConfigError, match=said):
        TokenRanges.of(stated, "here")


@pytest.mark.parametrize(
    "stated, said",
    [
        ({"action": [2040, 2049]}, "the model's vocabulary has 2048 ids"),
        ({"action": [2030, 2044]}, "holds eos_token_id 2043"),
        ({"action": [2045, 2048]}, "holds mask_token_id 2047"),
    ],
)
def test_ranges_fit_the_vocabulary(stated, said):
    with pytest.raises(ConfigError, match=said):
        read_vocabulary("tiny", mask_token_id=None, eos_token_id=None, token_ranges=stated)


def test_a_tokenizer_that_has_the_tokens_decides_their_ids():
    with pytest.raises(ConfigError, match=r"the tokenizer has <\|action_0\|> as 7, not 3"):
        RANGES.check(20, {}, {"<|action_0|>": 7}.get)
    RANGES.check(20, {}, {"<|action_0|>": 3, "<|action_2|>": 5}.get)


@pytest.mark.parametrize(
    "layout, said", [("sound*2", "sound is no range; .* text, action"), ("action*0", "is no part")]
)
def test_layouts_that_are_none(layout, said):
    vocabulary = read_vocabulary("tiny", mask_token_id=None, eos_token_id=None, token_ranges={"action": [9, 12]})
    with pytest.raises(ConfigError, match=said):
        vocabulary.rules(DecodeKeys(answer_ranges=layout, block_size=16))


def test_editing_is_refused():
    with pytest.raises(ConfigError, match=r"edit_share 0.1, num_turns 1 with token_ranges"):
        load_recipe(RECIPE, ["edit_share=0.1", "complementary=false"])


def test_records_and_answers_hold_them_as_text():
    ranges = {"action": [2000, 2017]}
    vocabulary = read_vocabulary("tiny", mask_token_id=None, eos_token_id=None, token_ranges=ranges)
    said = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "<|action_3|><|action_16|>!"}]
    chat, plain = vocabulary.encoder.encode_records([Conversation(said), Completion("a<|action_1|>", "<|action_17|>")])
    answer = chat[0][chat[1]].tolist()
    assert answer[:2] == [2003, 2016]
    assert vocabulary.text([*answer, vocabulary.special.eos]) == "<|action_3|><|action_16|>!"
    ids_T, trainable_T = plain
    assert 2001 in ids_T[~trainable_T]
    assert vocabulary.text(ids_T[trainable_T].tolist()) == "<|action_17|>"  # past the range: text
    assert not {*range(2000, 2017)} & {*ids_T[trainable_T].tolist()}


def test_answers_stay_in_their_ranges(tmp_path):
    """Whatever is drawn, at any temperature, in ragged batches as alone."""
    ranges = TokenRanges.of({"action": [20, 30], "image": [40, 44]}, "a test")
    keys = {"block_size": 4, "max_new_tokens": 10, "temperature": 2.0, "acceptance": "top", "threshold": 0.3}
    keys = DecodeKeys(**keys, answer_ranges="image*3, text*1, action*5")
    rules = DecodeRules.of(keys, mask_token_id=MASK, eos_token_id=EOS, special_ids=(MASK, 25, 41), ranges=ranges)
    policy = sharpen(load_policy(write_tiny_config(tmp_path), dtype="float32", init_weights="random"))
    prompts = [[1, 2, 3], [5], [20, 40, 9, 9, 9, 9]]
    together = decode(policy, prompts, rules)
    for index, rollout in enumerate(together):
        groups = ranges.group_of(torch.tensor(rollout.token_ids)).tolist()[:10]
        assert groups == [2, 2, 2, 0, 1, 1, 1, 1, 1, 0][: len(groups)]
        assert max(rollout.commit_logprob) <= 0
        (alone,) = decode(policy, [prompts[index]], rules, noise_ids=[index])
        assert alone.token_ids == rollout.token_ids
    plain = decode(policy, prompts, dataclasses.replace(rules, answer_groups=()))
    assert not any(set(rollout.token_ids) & ranges.ids for rollout in plain)


def test_they_are_saved_with_the_model(tmp_path):
    policy = load_policy("tiny", dtype="float32", token_ranges={"action": [2000, 2017]})
    save_policy(policy, tmp_path, block_size=16)
    assert known_ranges(tmp_path).stated == {"action": [2000, 2017]}
    assert load_policy(tmp_path).ranges == policy.ranges
    assert load_policy(tmp_path, token_ranges={"bin": [5, 9]}).ranges.stated == {"bin": [5, 9]}
    assert known_ranges(TINY_DIR) == NO_RANGES


def test_a_family_may_state_them(monkeypatch):
    family = dataclasses.replace(FAMILIES["llada2"], token_ranges={"image": (100, 200)})
    monkeypatch.setitem(FAMILIES._entries, "llada2", family)
    assert known_ranges(TINY_DIR).stated == {"image": [100, 200]}


def test_the_tasks_actions_bring_the_box_to_the_goal():
    robot, box, goal = (2, 4), (5, 1), (0, 6)
    bins = make_grid_data.actions(robot, box, goal)
    assert bins == [10, 4, 15, 2, 12, 16]
    moves = [bin - make_grid_data.MIDDLE for bin in bins]
    assert (robot[0] + moves[0], robot[1] + moves[1]) == box
    assert (box[0] + moves[3], box[1] + moves[4]) == goal
    made = make_grid_data.records(50, 0)
    assert len({one["messages"][0]["content"] for one in made}) == 50


@pytest.mark.slow
def test_a_run_of_a_few_steps_answers_with_actions_alone(tmp_path):
    assert make_grid_data.main(["--output", str(tmp_path), "--train", "300", "--heldout", "8"]) == 0
    data = [
        f"{name}=[{{path: {tmp_path / file}}}]"
        for name, file in (("datasets", "train.jsonl"), ("eval_datasets", "heldout.jsonl"))
    ]
    run = ["max_steps=4", "eval_steps=2", "save_steps=4", "eval_decode_prompts=4", "warmup_steps=0"]
    dfactory("train", RECIPE, *data, *run, f"output_dir={tmp_path / 'run'}")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] > lines[-1]["eval/loss"]
    previews = [json.loads(line) for line in (tmp_path / "run/previews.jsonl").read_text().splitlines()]
    assert all(preview["answered"].startswith("<|action_") for preview in previews)
    out = tmp_path / "answers.jsonl"
    keys = ["decode.answer_ranges=action*6", "decode.max_new_tokens=6"]
    dfactory("generate", "--model", tmp_path / "run", "--input", tmp_path / "heldout.jsonl", "--output", out, *keys)
    for line in out.read_text().splitlines():
        assert all(2000 <= token < 2017 for token in json.loads(line)["output_ids"])
