"""Recipes of the earlier dFactory, dead and misspelt keys, names of other frameworks, and the tables in the documents."""

import os
import re
from pathlib import Path

import pytest

from dfactory.cli import main
from dfactory.commands.schema import earlier_table, key_page
from dfactory.config.earlier_keys import IMPLIED, RENAMED
from dfactory.config.elsewhere import AUTOMODEL, COMMON, DARE, DLLM, DLLM_RL, LLADA, LLAMA_FACTORY, TRL, meant_by
from dfactory.config.load import COMMAND_LINE, known_keys
from dfactory.config.words import join_options
from dfactory.errors import ConfigError
from dfactory.recipe import Recipe, load_recipe, read_recipe
from tests.commands.conftest import ROOT, dfactory

EARLIER = ROOT / "tests/config/earlier/llada2_bd_sft.yaml"  # its own recipe, with another model and max_seq_len


def test_a_recipe_of_the_earlier_dfactory():
    loaded = read_recipe(EARLIER, ranks=8)
    recipe = loaded.recipe
    assert (recipe.model_name_or_path, recipe.output_dir, recipe.max_length) == ("tiny", "./outputs", 64)
    assert [entry.path for entry in recipe.datasets] == ["train.jsonl"]
    assert recipe.gradient_accumulation_steps == 2  # 16 / (1 x 8)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.lr_scheduler_type) == (1e-5, 0.03, "cosine")
    assert recipe.warmup_of(1000) == 30
    assert (recipe.stage, recipe.dtype, recipe.gradient_checkpointing) == ("sft", "bfloat16", True)
    assert recipe.deepspeed_overrides["zero_optimization"]["stage"] == 3
    assert recipe.deepspeed_overrides["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert (recipe.complementary, recipe.packing, recipe.noise_level) == (False, False, "document")
    assert (recipe.save_steps, recipe.report_to, recipe.resume_from_checkpoint) == (None, [], False)
    assert len(loaded.aliases) == 54 + 5  # every key that it gives, and defaults of that code which differ
    assert all(alias.new for alias in loaded.aliases)
    assert loaded.origins["learning_rate"] == str(EARLIER)


def test_it_prints_what_became_of_each_key(capsys, tmp_path):
    data = ROOT / "recipes/quickstart/data/heldout.jsonl"
    words = ["check", str(EARLIER), "--data.train_path", str(data), f"--train.output_dir={tmp_path}/run", "--gpus", "4"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "training would start" in printed.out
    told = " ".join(printed.err.split())
    assert "train.lr = 1e-05 learning_rate = 1e-05" in told
    assert "train.global_batch_size = 16 gradient_accumulation_steps = 4" in told
    assert "train.ckpt_manager = dcp left out" in told


@pytest.mark.slow
def test_it_trains(tmp_path):
    data = ROOT / "recipes/quickstart/data/heldout.jsonl"
    words = ["--data.train_path", data, "--train.output_dir", tmp_path / "run", "--train.max_steps", 1]
    words += ["--train.enable_fsdp_offload", "false", "--train.global_batch_size", 2]
    dfactory("train", EARLIER, *words)
    assert (tmp_path / "run/checkpoint-1/model.safetensors").is_file()


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.same_token_labels=false", "train.same_token_labels false .* its own place, never the next one"),
        ("train.block_diffusion_mode=false", "train.block_diffusion_mode false .* set block_size to max_length"),
        ("train.rmpad=true", "train.rmpad true .* use packing: true"),
        ("train.ulysses_parallel_size=2", "train.ulysses_parallel_size 2 .* use ZeRO"),
        ("train.optimizer=muon", "train.optimizer muon .* AdamW"),
        ("train.lr_decay_ratio=0.5", "train.lr_decay_ratio 0.5 .* max_steps"),
        ("data.text_keys=text", "data.text_keys text .* rename the column"),
        ("data.data_type=plaintext", "data.data_type plaintext .* stage: cpt"),
        ("data.train_path=mix.yaml", "data.train_path mix.yaml: name the files of a mixture in datasets"),
        ("model.tokenizer_path=other", "model.tokenizer_path other cannot be had"),
        ("train.global_batch_size=5", "train.global_batch_size 5 is not a multiple of 1 row.* x 2 rank"),
        ("train.num_train_epochs=3", "train.save_epochs 1 in a run of 3 epochs: .* use save_steps"),
        ("train.learning_rate=1", "unknown key train.learning_rate in the command line"),
        ("train.micro_batchsize=1", "did you mean train.micro_batch_size, here per_device_train_batch_size"),
        ("data.max_seq_length=64", "did you mean data.max_seq_len, here max_length"),
        ("train.zzz=1", "dfactory schema --earlier"),
    ],
)
def test_dead_and_misspelt_keys_of_the_earlier_dfactory(override, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(EARLIER, [override], ranks=2)


@pytest.mark.parametrize(
    "overrides, key, value",
    [
        (["train.confidence_beta=2.0"], "stage", "cap"),
        (["train.confidence_beta=0"], "stage", "sft"),
        (["train.save_steps=0"], "save_steps", None),
        (["train.load_checkpoint_path=auto"], "resume_from_checkpoint", True),
        (["train.use_wandb=true"], "report_to", ["wandb"]),
        (["train.enable_full_shard=false"], "deepspeed_overrides.zero_optimization.stage", 2),
        (["train.data_parallel_mode=ddp"], "deepspeed_overrides.zero_optimization.stage", 1),
        (["learning_rate=0.5"], "learning_rate", 0.5),  # both languages: the command line is laid over the recipe
        (["train.lr=0.5"], "learning_rate", 0.5),
        (["complementary=true"], "complementary", True),
    ],
)
def test_values_of_the_earlier_dfactory(overrides, key, value):
    name, *inner = key.split(".")
    got = getattr(load_recipe(EARLIER, overrides), name)
    for part in inner:
        got = got[part]
    assert got == value


def test_one_layer_cannot_say_two_things():
    with pytest.raises(ConfigError, match=r"says learning_rate 0.5, and 0.1 by an earlier key: keep one"):
        load_recipe(EARLIER, ["learning_rate=0.5", "train.lr=0.1"])


def test_earlier_keys_name_real_ones():
    assert set(RENAMED.values()) | set(IMPLIED) <= set(known_keys(Recipe))


# --- words, origins, names of other frameworks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, joined",
    [
        ("r.yaml --a.b 1 --c=2 d=3", "r.yaml a.b=1 c=2 d=3"),
        ("--learning-rate 1e-5 r.yaml", "learning_rate=1e-5 r.yaml"),
        ("r.yaml --gpus 8 --lr_min -1", "r.yaml --gpus 8 lr_min=-1"),
        ("r.yaml --packing --x 1", "r.yaml --packing x=1"),
        ("r.yaml --gpu 8", "r.yaml --gpu 8"),  # nearly an option of the command: argparse refuses it
    ],
)
def test_options_are_keys(words, joined):
    assert join_options(words.split(), ["--gpus", "--help"]) == joined.split()


def test_where_a_key_comes_from(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model_name_or_path: tiny\noutput_dir: x\ndatasets: [{path: a.jsonl}]\ndecode: {threshold: 0.5}\n")
    origins = read_recipe(file, ["seed=1", "output_dir=y"]).origins
    assert origins == dict.fromkeys(("model_name_or_path", "datasets", "decode.threshold"), str(file)) | dict.fromkeys(
        ("seed", "output_dir"), COMMAND_LINE
    )


def test_names_of_other_frameworks_are_understood():
    known = known_keys(Recipe)
    for names in (TRL, LLAMA_FACTORY, DLLM, DLLM_RL, LLADA, DARE, AUTOMODEL, COMMON):
        for foreign in names:
            assert foreign not in known, foreign
            assert meant_by(foreign, known), foreign


def test_groups_of_other_frameworks_are_told_key_by_key(tmp_path):
    file = tmp_path / "recipe.yaml"
    rollout = "{num_task_per_step: 64, block_size: 4, engine: {max_token: 9, unheard_of: 1}}"
    file.write_text(f"model_name_or_path: tiny\noutput_dir: x\nrollout: {rollout}\n")
    told = (
        "unknown key rollout in .*; the keys of a recipe have no such groups: "
        "rollout.num_task_per_step is prompts_per_step, rollout.block_size is block_size, "
        "rollout.engine.max_token is decode.max_new_tokens$"
    )
    with pytest.raises(ConfigError, match=told):
        load_recipe(file)


MISSPELT = {
    "lerning_rate": "learning_rate",
    "blocksize": "block_size",
    "noise_low": "noise_range_low",
    "max_lenght": "max_length",
    "gradient_acumulation_steps": "gradient_accumulation_steps",
    "complementry": "complementary",
    "decode.treshold": "decode.threshold",
    "decode.max_tokens": "decode.max_new_tokens",
    "epsilon_hi": "epsilon_high",
    "confidence_betta": "confidence_beta",
    "reward_function": "reward_funcs",
    "save_step": "save_steps",
    "cutoff_len": "max_length",
    "lr": "learning_rate",
    "max_completion_length": "decode.max_new_tokens",
    "lora_rank": "lora_r",
}


@pytest.mark.parametrize("misspelt, meant", MISSPELT.items())
def test_misspelt_keys_end_with_2_and_the_nearest_name(misspelt, meant, capsys):
    for words in ([f"{misspelt}=1"], [f"--{misspelt}", "1"]):
        assert main(["train", str(ROOT / "recipes/quickstart/sft.yaml"), *words]) == 2
        assert f"unknown key {misspelt} in the command line; did you mean {meant}?" in capsys.readouterr().err


# --- tables in the documents ------------------------------------------------------------------------------------------


def test_the_page_of_keys_is_what_schema_prints(capsys):
    assert main(["schema", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == key_page()
    told = "dfactory schema --markdown > recipes/KEYS.md"
    assert (ROOT / "recipes/KEYS.md").read_text().strip() == key_page(), told
    assert "recipes/KEYS.md" in (ROOT / "README.md").read_text()


def test_the_page_for_newcomers_has_the_table_of_earlier_keys(capsys):
    assert main(["schema", "--earlier"]) == 0
    assert capsys.readouterr().out.strip() == earlier_table()
    assert earlier_table() in (ROOT / "recipes/COMING_FROM.md").read_text()


@pytest.mark.parametrize("page", ["recipes/COMING_FROM.md"])
def test_keys_that_a_page_names_exist(page):
    """Whatever stands in the second column of its tables as `key` is a key."""
    known = set(known_keys(Recipe))
    rows = [line.split("|")[2] for line in Path(ROOT / page).read_text().splitlines() if line.startswith("| `")]
    named = {key for cell in rows for key in re.findall(r"`([a-z_][a-z_0-9.]*)(?:: [^`]*)?`", cell)}
    assert len(named) > 40
    assert named <= known, named - known


def test_ranks_are_those_of_the_launch(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    assert load_recipe(EARLIER).gradient_accumulation_steps == 4
