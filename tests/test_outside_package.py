"""A package outside dFactory adds an algorithm, a family, a decoding rule and a reward: pip installs it, names select it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfactory.models.tiny import TINY_DIR

ROOT = Path(__file__).resolve().parents[1]
MISTRAL = {
    **{"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 2048, "hidden_size": 32},
    **{"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": None},
    **{"max_position_embeddings": 512, "tie_word_embeddings": False, "attention_dropout": 0.0},
}
QUICK = ["max_steps=2", "eval_datasets=[]", "eval_decode_prompts=0", "init_weights=random", "report_to=[]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which pip has put the package."""
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(ROOT / "tests/outside_package", folder / "source")  # building writes beside it
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", folder / "site", source], check=True, timeout=300)
    return folder / "site"


@pytest.fixture(scope="module")
def dfactory(installed, tmp_path_factory):
    """dfactory(word, ...): what the command prints, with the package on the path."""
    folder = tmp_path_factory.mktemp("runs")

    def call(*words: object, status: int = 0) -> str:
        environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dfactory.cli", *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


@pytest.mark.slow
def test_one_of_each(dfactory, tmp_path):
    schema = dfactory("schema", "--markdown")
    assert "| `focal_gamma` | float | `2.0` | stage focal: how much less" in schema
    assert "`decode.least_margin`" in schema
    assert "| `margin` | Every position whose margin exceeds" in dfactory("schema", "--rules")
    assert "| `stage: focal` | supervised fine-tuning that looks at" in dfactory("schema", "--algorithms")

    model = tmp_path / "mistral"
    shutil.copytree(TINY_DIR, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    (model / "config.json").write_text(json.dumps(MISTRAL))
    sft, run = ROOT / "recipes/quickstart/sft.yaml", tmp_path / "run"
    chosen = [f"model_name_or_path={model}", "stage=focal", "focal_gamma=1.5", f"output_dir={run}"]
    refused = dfactory("train", sft, *chosen, "stage=sft", status=2)
    assert "focal_gamma in the command line belongs to stage focal, and this is stage sft: leave it out" in refused
    dfactory("train", sft, *chosen, *QUICK)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Write in order: STONE"}\n')
    answers = tmp_path / "answers.jsonl"
    rule = ["decode.rule=margin", "decode.least_margin=0.2", "decode.max_new_tokens=16"]
    dfactory("generate", "--model", run, "--input", prompts, "--output", answers, *rule)
    assert json.loads(answers.read_text())["forwards"] >= 1

    rl = [
        ROOT / "recipes/quickstart/rl.yaml",
        "model_name_or_path=tiny",
        "reward_funcs=[brevity]",
        f"output_dir={run}2",
    ]
    assert "brevity, weight 1" in dfactory("check", *rl)
