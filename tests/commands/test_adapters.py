"""A LoRA run as the model of other commands: read as it is, on top of its base."""

import json
import random
from pathlib import Path

import pytest

from dfactory.cli import main
from dfactory.commands.export import export
from dfactory.models.registry import load_policy
from tests.commands.conftest import ROOT, dfactory, write_recipe

DECODE = ["decode.mask_token_id=95", "decode.eos_token_id=94", "decode.max_new_tokens=16"]


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt_ids": [5, 6, 7]}\n{"prompt_ids": [8]}\n')
    return tmp_path / "prompts.jsonl"


def answers(model: Path, prompts: Path) -> list[list[int]]:
    out = prompts.with_name("answers.jsonl")
    words = [
        "--model",
        model,
        "--input",
        prompts,
        "--output",
        out,
        "--dtype",
        "float32",
        "decode.max_new_tokens=16",
        *DECODE,
    ]
    assert main(["generate", *map(str, words)]) == 0
    return [json.loads(line)["output_ids"] for line in out.read_text().splitlines()]


def test_generate_and_eval_read_adapters(lora_run, prompts, tmp_path):
    """The same answers and likelihoods as the exported model's; not those of the base."""
    export(str(lora_run), str(tmp_path / "whole"))
    assert answers(lora_run, prompts) == answers(tmp_path / "whole", prompts)

    def bounds(model: Path) -> list[dict]:
        data, out = lora_run.parent / "held_out.jsonl", tmp_path / "bounds.jsonl"
        words = ["--model", model, "--data", data, "--output", out, "--elbo-pairs", 2, "--dtype", "float32", *DECODE]
        assert main(["eval", *map(str, words)]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    whole, base = bounds(tmp_path / "whole"), bounds(lora_run.parent / "base")
    for found, line, other in zip(bounds(lora_run), whole, base, strict=True):
        assert found["elbo"] == pytest.approx(line["elbo"], rel=1e-5)
        assert found["elbo"] != pytest.approx(other["elbo"], rel=1e-3)


def write_pairs(file: Path) -> Path:
    draw = random.Random(5)
    rows = [
        {name: [draw.randrange(90) for _ in range(8)] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for _ in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_dpo_starts_from_adapters_under_zero_3(lora_run, tmp_path, capsys):
    """Its reference is the LoRA run's policy, and its own adapters stand on that run."""
    pairs = {"path": str(write_pairs(tmp_path / "pairs.jsonl"))}
    keys = {"stage": "dpo", "use_peft": True, "datasets": [pairs], "max_length": 24, "save_steps": 1}
    keys |= {"deepspeed": str(ROOT / "recipes/deepspeed/zero3.json"), "lora_target_modules": ["q_proj", "down_proj"]}
    recipe = write_recipe(tmp_path, lora_run, 90, 95, 94, **keys)
    assert main(["check", str(recipe)]) == 0
    assert "every tensor has the name and shape" in " ".join(capsys.readouterr().out.split())
    dfactory("train", recipe)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    stated = json.loads((tmp_path / "run/checkpoint-2/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(stated) == lora_run / "checkpoint-2"
    assert load_policy(tmp_path / "run").has_adapters
    assert export(str(tmp_path / "run"), str(tmp_path / "out")) == 0
