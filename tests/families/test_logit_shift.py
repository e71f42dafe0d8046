"""`logit_shift` of an autoregressive model: with 1 it predicts from where it was trained to, from the first step on."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dfactory.commands.export import export
from dfactory.errors import ConfigError
from dfactory.inference import Pipeline
from dfactory.models.adapters import add_adapters
from dfactory.models.registry import known_shift, load_policy
from dfactory.models.saving import save_policy
from tests.commands.conftest import ROOT, dfactory, write_records
from tests.families.cases import golden
from tests.models.test_autoregressive import LENGTH, PROMPT, block_1_batch

IDS = {"mask_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def llama(random_policy, tmp_path):
    """A directory with random weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_policy(random_policy("llama"), directory)
    return directory


@torch.no_grad()
def test_at_block_size_1_scores_are_those_of_the_autoregressive_model(llama):
    policy = load_policy(llama, dtype="float32", logit_shift=1)
    mask_id = policy.config.vocab_size - 1
    ids = np.random.default_rng(0).integers(0, mask_id, LENGTH, dtype=np.int32)
    logits = AutoModelForCausalLM.from_pretrained(llama)(torch.tensor(ids[None]).long()).logits[0, PROMPT - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[PROMPT:, None]).long())[:, 0]

    batch = block_1_batch(ids, mask_id, low=1.0, high=1.0)
    torch.testing.assert_close(policy(batch).logprob_N, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(load_policy(llama, dtype="float32")(batch).logprob_N, expected, atol=0.1)


def test_a_checkpoint_keeps_it(llama, tmp_path):
    """What is saved, trained again, exported, or decoded needs no key."""
    directories = [llama, *(tmp_path / name for name in ("first", "second", "exported", "back"))]
    for source, target, shift in zip(directories, directories[1:3], (1, None), strict=False):
        target.mkdir()
        save_policy(load_policy(source, dtype="float32", logit_shift=shift), target)
        assert json.loads((target / "generation_config.json").read_text())["logit_shift"] == 1
    export(directories[2], directories[3])
    assert known_shift(directories[3]) == 1
    assert Pipeline(directories[3], **IDS).policy.logit_shift == 1

    directories[4].mkdir()
    save_policy(load_policy(directories[2], logit_shift=0), directories[4])
    assert load_policy(directories[4]).logit_shift == 0


def test_adapters_keep_it(llama, tmp_path):
    policy = load_policy(llama, dtype="float32", logit_shift=1)
    add_adapters(policy, r=2, alpha=4, dropout=0.0, target_modules=["q_proj"], seed=0)
    with torch.no_grad():
        for name, tensor in policy.named_parameters():
            tensor.add_(0.1 * ("lora_B" in name))
    adapters, merged = tmp_path / "adapters", tmp_path / "merged"
    adapters.mkdir()
    save_policy(policy, adapters)
    export(adapters, merged)
    assert [load_policy(directory).logit_shift for directory in (adapters, merged)] == [1, 1]


def test_a_family_of_diffusion_models_has_its_own():
    for name, own in (("sdar", 0), ("dream", 1)):
        assert known_shift(golden(name).directory, own) == own
        with pytest.raises(ConfigError, match=f"logit_shift {1 - own}: that of the family {name}, .* is {own}; leave"):
            known_shift(golden(name).directory, 1 - own)


@pytest.mark.slow
def test_a_run_with_a_shift(llama, tmp_path):
    """Told by `check`, kept by the run, refused on resuming with another."""
    recipe = tmp_path / "cpt.yaml"
    shutil.copyfile(ROOT / "recipes/quickstart/cpt.yaml", recipe)
    records = write_records(tmp_path / "ids.jsonl", 8, 60)
    keys = [
        *(f"{name}={value}" for name, value in (IDS | {"model_name_or_path": llama, "max_steps": 2}).items()),
        *(f"{name}=[{{path: {records}}}]" for name in ("datasets", "eval_datasets")),
        *("block_size=4", "block_size_schedule=null", "max_length=32", "row_length=128", "mask_embedding_noise=0"),
        *("mask_embedding_noise_steps=0", f"output_dir={tmp_path / 'run'}", "save_steps=1"),
    ]
    assert "the hidden state to its left (logit_shift 1)" in dfactory("check", recipe, "logit_shift=1", *keys).stdout
    dfactory("train", recipe, "logit_shift=1", *keys)
    assert Pipeline(tmp_path / "run", eos_token_id=2).policy.logit_shift == 1
    refused = dfactory("train", recipe, *keys, "max_steps=3", "resume_from_checkpoint=true", status=2)
    assert "logit_shift" in refused.stderr
