"""A tiny recipe on tokenised records, and a way to run jobs on one or two real processes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/llada2_tiny"
BLOCK, MASK, EOS = 8, 158, 156


def write_records(path: Path, count: int, seed: int) -> Path:
    """Tokenised documents of 10 to 40 tokens, their first third being the prompt."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            length = rng.randint(10, 40)
            row = {"input_ids": [rng.randrange(150) for _ in range(length)], "prompt_lengths": length // 3}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def write_recipe(folder: Path) -> Path:
    """20 steps of 8 rows on the golden checkpoint, in fp32; the data lasts for a bit more than two steps an epoch."""
    keys = {
        "model_name_or_path": str(GOLDEN),
        "dtype": "float32",
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "datasets": [{"path": str(write_records(folder / "train.jsonl", 40, seed=1))}],
        "eval_datasets": [{"path": str(write_records(folder / "held_out.jsonl", 12, seed=2))}],
        "block_size": BLOCK,
        "max_length": 40,
        "row_length": 240,
        "max_steps": 20,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 2,
        "output_dir": str(folder / "unused"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """Tokenised pairs: prompts of 3 to 12 tokens, answers of 4 to 24."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            lengths = {"prompt_ids": (3, 12), "chosen_ids": (4, 24), "rejected_ids": (4, 24)}
            row = {name: [rng.randrange(150) for _ in range(rng.randint(*span))] for name, span in lengths.items()}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def dpo_keys(tmp_path_factory) -> list[str]:
    return write_dpo_keys(tmp_path_factory.mktemp("pairs"))


def write_dpo_keys(folder: Path) -> list[str]:
    """Overrides that turn the recipe into preference optimisation."""
    train, held_out = write_pairs(folder / "train.jsonl", 30, seed=3), write_pairs(folder / "held_out.jsonl", 6, seed=4)
    data = [f"datasets=[{{path: {train}}}]", f"eval_datasets=[{{path: {held_out}}}]"]
    return ["stage=dpo", *data]


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory):
    """run_jobs(processes, [(recipe, overrides), ...]) trains one after another and asserts success."""

    def run(processes: int, jobs: list[tuple[Path, list[str]]], expect: int = 0) -> str:
        file = tmp_path_factory.mktemp("jobs") / "jobs.json"
        file.write_text(json.dumps([{"recipe": str(recipe), "overrides": keys} for recipe, keys in jobs]))
        done = launch(processes, "worker.py", file)
        assert (done.returncode == 0) == (expect == 0), f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    return run


def launch(processes: int, worker: str, jobs: Path) -> subprocess.CompletedProcess:
    """Run a worker of this folder on a file of jobs, by itself or under torchrun."""
    command = [str(ROOT / "tests/engine" / worker), str(jobs)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=540, check=False)


def environment() -> dict[str, str]:
    """For processes that tests start."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return variables | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}


def read_metrics(run: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]
