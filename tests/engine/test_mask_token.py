"""Autoregressive models that `mask_token: auto` gives a mask, trained two steps: under ZeRO-3 and expert parallelism too,
resumed, compared with a reference, exported, read by plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dfactory.commands.export import export
from dfactory.errors import ConfigError
from dfactory.inference import Pipeline
from dfactory.recipe import load_recipe
from dfactory.train import train
from tests.autoregressive import RESERVED, write_ar_model, write_cpt_recipe
from tests.engine.conftest import read_metrics, write_pairs
from tests.engine.test_equality import ZERO

NOTHING_FREE = ["<|user|>", "<|assistant|>"]
CHOSEN = {"reserved": (7, "<reserved_1>"), "unused": (261, "<|mask|>"), "added": (261, "<|mask|>")}
CHOSEN["untied"] = CHOSEN["added"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mask")


@pytest.fixture(scope="module")
def recipes(folder) -> dict[str, Path]:
    models = {
        "reserved": write_ar_model(folder / "reserved", RESERVED),
        "unused": write_ar_model(folder / "unused", NOTHING_FREE, spare_rows=2),
        "added": write_ar_model(folder / "added", NOTHING_FREE),
        "untied": write_ar_model(folder / "untied", NOTHING_FREE, tied=False),
    }
    return {name: write_cpt_recipe(folder, model) for name, model in models.items()}


@pytest.fixture(scope="module")
def told(folder, recipes, run_jobs) -> str:
    """All runs of one rank, in one process; what they printed."""
    pairs = write_pairs(folder / "pairs.jsonl", 8, seed=5)
    two = ["per_device_train_batch_size=2", "save_steps=1"]
    jobs = [(file, [*two, f"output_dir={folder / 'runs' / name}"]) for name, file in recipes.items()]
    further = {
        "then": [f"resume_from_checkpoint={folder / 'runs/added/checkpoint-1'}", *two],
        "dpo": ["stage=dpo", f"datasets=[{{path: {pairs}}}]", "reference=copy", "eos_token_id=1"],
        "next": [f"model_name_or_path={folder / 'runs/added'}", "stage=sft", "block_size=null"],
    }
    jobs += [(recipes["added"], [*keys, f"output_dir={folder / 'runs' / name}"]) for name, keys in further.items()]
    return run_jobs(1, jobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_trained_exported_and_read_by_plain_transformers(told, folder, tmp_path, name):
    index, literal = CHOSEN[name]
    assert f"mask token: {literal}, id {index}, " in told
    assert export(str(folder / "runs" / name), str(tmp_path / "exported")) == 0
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "exported"),
        AutoTokenizer.from_pretrained(tmp_path / "exported"),
    )
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (literal, index)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size > index
    before = load_file(folder / name / "model.safetensors")["model.embed_tokens.weight"]
    row = before[index] if index < len(before) else before.mean(dim=0)
    assert (model.get_input_embeddings().weight[index] - row).abs().max() > 1e-3  # it has learnt
    pipeline = Pipeline(tmp_path / "exported", device="cpu", max_new_tokens=8)  # no key names the mask
    assert pipeline.rules.mask_token_id == index
    assert pipeline.chat([{"role": "user", "content": "say 3"}]).rollout.output_ids


@pytest.mark.slow
def test_resumed_with_a_reference_with_full_attention_and_in_a_next_stage(told, folder):
    whole, resumed = (load_file(folder / f"runs/{name}/checkpoint-2/model.safetensors") for name in ("added", "then"))
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert read_metrics(folder / "runs/dpo", "loss")[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    for name in ("dpo", "next"):
        saved = json.loads((folder / f"runs/{name}/checkpoint-2/config.json").read_text())
        assert saved["vocab_size"] == 262
        assert AutoTokenizer.from_pretrained(folder / f"runs/{name}/checkpoint-2").mask_token_id == 261
    assert "mask token: <|mask|>, id 261, the model's own" in told


@pytest.mark.slow
def test_a_changed_template_cannot_change_the_mask_of_a_resumed_run(told, folder, recipes, tmp_path):
    run = folder / "runs/reserved/checkpoint-2"
    (tmp_path / "own.jinja").write_text("<reserved_1>" + (folder / "reserved/chat_template.jinja").read_text())
    keys = [
        f"resume_from_checkpoint={run}",
        f"output_dir={tmp_path / 'run'}",
        f"chat_template_path={tmp_path / 'own.jinja'}",
    ]
    with pytest.raises(ConfigError, match=r"mask_token stands for 8 now, and .*checkpoint-2 was trained with 7"):
        train(load_recipe(recipes["reserved"], keys))


@pytest.mark.slow
def test_sharded_over_two_ranks(told, folder, recipes, recipe_file, run_jobs):
    """ZeRO 3 computes what one rank does; experts are shared with a row beside them."""
    shared = ["expert_parallel_size=2", "mask_token_id=null", "mask_token=auto", "max_steps=2", "eval_datasets=[]"]
    jobs = [
        (recipes["untied"], [ZERO[3], f"output_dir={folder / 'runs/zero3'}"]),
        (recipe_file, [*shared, "per_device_train_batch_size=4", f"output_dir={folder / 'runs/experts'}"]),
    ]
    run_jobs(2, jobs)
    one, three = (read_metrics(folder / f"runs/{name}") for name in ("untied", "zero3"))
    assert three == pytest.approx(one, abs=1e-5)
    for name, size in (("zero3", 262), ("experts", 161)):
        saved = load_file(folder / f"runs/{name}/checkpoint-2/model.safetensors")
        assert saved["lm_head.weight"].shape[0] == size
