"""Real runs of a few steps, each in a process of its own, because DeepSpeed's process group lives as long as a process."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.batches import TINY_SIZES as SIZES

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/llada2_tiny"
FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def save_plain(directory: Path, family: str, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights saved by transformers itself, with a file that only has to be carried along."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model_class(config_class(**SIZES, tie_word_embeddings=tied)).to(dtype).save_pretrained(directory)
    (directory / "NOTICE").write_text("carry me")
    return directory


def write_records(file: Path, count: int, vocabulary: int) -> Path:
    """Records that come tokenised: 4 prompt tokens and a short answer."""
    draw = random.Random(0)
    rows = [[draw.randrange(vocabulary) for _ in range(draw.randrange(10, 30))] for _ in range(count)]
    file.write_text("".join(json.dumps({"input_ids": row, "prompt_lengths": 4}) + "\n" for row in rows))
    return file


def write_recipe(folder: Path, model: Path, vocabulary: int, mask: int, eos: int, **keys) -> Path:
    """A recipe over 20 tokenised records; YAML is a superset of JSON."""
    records = write_records(folder / "ids.jsonl", 20, vocabulary)
    recipe = {
        "model_name_or_path": str(model),
        "dtype": "float32",
        "output_dir": str(folder / "run"),
        "datasets": [{"path": str(records)}],
        "block_size": 8,
        "max_length": 32,
        "max_steps": 2,
        "learning_rate": 0.01,
        "mask_token_id": mask,
        "eos_token_id": eos,
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe | keys))
    return file


def dfactory(*words: object, status: int = 0) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "dfactory.cli", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="session")
def golden_run(tmp_path_factory) -> Path:
    """Three steps, each evaluated and saved, on the golden LLaDA2 checkpoint with foreign files beside it."""
    folder = tmp_path_factory.mktemp("golden")
    model = folder / "model"
    shutil.copytree(GOLDEN, model, ignore=shutil.ignore_patterns("forward.safetensors", "expected.json"))
    (model / "modeling_x.py").write_text("raise SystemExit('executed')\n")
    (model / "NOTICE").write_text("carry me")
    held_out = write_records(folder / "held_out.jsonl", 3, 150)
    extra = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "eval_datasets": [{"path": str(held_out)}]}
    dfactory("train", write_recipe(folder, model, vocabulary=150, mask=158, eos=156, **extra))
    return folder / "run"


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory) -> Path:
    """The run folder of two LoRA steps, each evaluated and saved, on Qwen3-shaped weights with tied embeddings; the base
    is `base` beside it."""
    folder = tmp_path_factory.mktemp("lora")
    base = save_plain(folder / "base", "qwen3", tied=True)
    held_out = write_records(folder / "held_out.jsonl", 3, 90)
    extra = {"use_peft": True, "eval_steps": 1, "save_steps": 1, "eval_datasets": [{"path": str(held_out)}]}
    dfactory("train", write_recipe(folder, base, vocabulary=90, mask=95, eos=94, **extra))
    return folder / "run"


@pytest.fixture(scope="session")
def llama_run(tmp_path_factory) -> Path:
    """The run folder of one full step on Llama-shaped weights with a head of its own."""
    folder = tmp_path_factory.mktemp("llama")
    base = save_plain(folder / "base", "llama", tied=False)
    dfactory("train", write_recipe(folder, base, vocabulary=90, mask=95, eos=94, max_steps=1))
    return folder / "run"
