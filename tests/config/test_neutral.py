"""Values by which other frameworks say "nothing": taken for what they mean there, or refused by name."""

import pytest

from dfactory.decoding.keys import DecodeKeys, decode_keys_over, load_decode_keys
from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from tests.commands.conftest import ROOT

SFT = ROOT / "recipes/quickstart/sft.yaml"
RL = ROOT / "recipes/quickstart/rl.yaml"


@pytest.mark.parametrize(
    "override, value",
    [
        ("max_steps=-1", None),
        ("save_total_limit=0", None),
        ("save_total_limit=-1", None),
        ("save_total_limit=null", None),
        ("save_steps=0", None),
        ("save_steps=-1", None),
        ("eval_steps=0", None),
        ("max_grad_norm=0", 0.0),
        ("max_grad_norm=null", 0.0),
        ("warmup_steps=null", 0.0),
        ("report_to=none", []),
        ("report_to=null", []),
        ("report_to=[none]", []),
        ("report_to=wandb", ["wandb"]),
        ("resume_from_checkpoint=null", False),
        ("lr_scheduler_type=constant_with_warmup", "constant"),
        ("optim=adamw_torch_fused", "adamw"),
        ("row_length=0", None),
        ("eval_datasets=null", []),
        ("decode.top_p=1.0", None),
        ("decode.top_p=1", None),
        ("decode.top_k=0", None),
        ("decode.top_k=-1", None),
    ],
)
def test_neutral_values_of_a_recipe(override, value):
    recipe = load_recipe(SFT, [override, "eval_decode_prompts=0"])
    for part in override.partition("=")[0].split("."):
        recipe = getattr(recipe, part)
    assert recipe == value


def test_a_file_says_the_same(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = "model_name_or_path: tiny\noutput_dir: x\ndatasets: [{path: a.jsonl}]\nmax_steps: -1\nreport_to: none\n"
    file.write_text(text + "decode: {top_k: 0, top_p: 1.0}\nsave_total_limit: -1\n")
    recipe = load_recipe(file)
    assert (recipe.max_steps, recipe.report_to, recipe.save_total_limit) == (None, [], None)
    assert (recipe.decode.top_k, recipe.decode.top_p) == (None, None)


def test_neutral_values_of_reinforcement_learning():
    """The learner's likelihood is that of the plain distribution: these leave it plain."""
    recipe = load_recipe(RL, ["decode.top_p=1.0", "decode.top_k=0"])
    assert (recipe.decode.top_p, recipe.decode.top_k) == (None, None)
    with pytest.raises(ConfigError, match=r"top_k or top_p other than"):
        load_recipe(RL, ["decode.top_p=0.9"])


def test_neutral_values_of_decoding():
    keys = load_decode_keys(["top_p=1.0", "decode.top_k=-1", "temperature=1.0"])
    assert (keys.top_p, keys.top_k) == (None, None)
    keys = decode_keys_over(DecodeKeys(top_k=5, top_p=0.5), {"top_k": 0, "top_p": 1}, "the request")
    assert (keys.top_k, keys.top_p) == (None, None)


@pytest.mark.parametrize("name, value", [("min_p", 0), ("min_p", 0.0), ("repetition_penalty", 1.0), ("num_beams", 1)])
def test_keys_of_others_that_change_nothing_at_their_value(name, value):
    assert load_decode_keys([f"{name}={value}"]) == DecodeKeys()
    assert load_recipe(SFT, [f"decode.{name}={value}"]).decode == load_recipe(SFT).decode
    assert decode_keys_over(DecodeKeys(), {name: value}, "generation_kwargs") == DecodeKeys()


@pytest.mark.parametrize(
    "override, message",
    [
        ("decode.min_p=0.1", r"unknown key decode.min_p"),
        ("decode.repetition_penalty=1.1", r"unknown key decode.repetition_penalty"),
        ("seed=-1", r"seed -1 .* at least 0"),
        ("max_steps=0", r"max_steps 0 .* at least 1"),
        ("max_steps=-2", r"max_steps -2 .* at least 1"),
        ("num_train_epochs=-1", r"num_train_epochs -1"),
        ("logging_steps=0", r"logging_steps 0 .* at least 1"),
        ("warmup_ratio=0.03", r"unknown key warmup_ratio .* did you mean warmup_steps"),
        ("report_to=all", r"report_to all is not known: take of aim, clearml"),
    ],
)
def test_what_has_no_meaning_here_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(SFT, [override])


def test_a_global_batch_of_zero_warmup_and_a_ratio():
    """transformers' default warmup_steps 0 beside a warmup_ratio: the ratio is named, never dropped."""
    with pytest.raises(ConfigError, match="warmup_ratio"):
        load_recipe(SFT, ["warmup_steps=0", "warmup_ratio=0.1"])
    assert load_recipe(SFT, ["warmup_steps=0", "warmup_ratio=0"]).warmup_steps == 0
