"""Runs that would end with status 0 and nothing to show, each broken for real."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dfactory.errors import SilentFailureError
from dfactory.models.registry import load_policy
from dfactory.recipe import load_recipe
from dfactory.runs.sanity import VISITS, ExpertCoverage
from dfactory.train import train
from tests.engine.conftest import GOLDEN, read_metrics


def _train(recipe_file: Path, run: Path, *keys: str) -> list[dict]:
    base = ["eval_datasets=[]", "max_steps=2", "warmup_steps=0", "per_device_train_batch_size=4"]
    assert train(load_recipe(recipe_file, [*base, f"output_dir={run}", *keys])) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_changes_no_parameter_ends_the_run(recipe_file, tmp_path):
    with pytest.raises(SilentFailureError, match="step 1 changed no parameter on any rank, with learning_rate 1e-30"):
        _train(recipe_file, tmp_path, "learning_rate=1e-30")
    assert read_metrics(tmp_path, "step") == []
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_first_step_of_a_warmup_may_change_nothing(recipe_file, tmp_path, capsys):
    _train(recipe_file, tmp_path / "warm", "warmup_steps=1")
    assert "nothing was trained" not in capsys.readouterr().err
    _train(recipe_file, tmp_path / "cold", "warmup_steps=1", "max_steps=1")
    assert "no step up to 1 had a learning rate above 0: nothing was trained" in capsys.readouterr().err


def test_read_weights_that_know_no_more_than_guessing_are_told(recipe_file, tmp_path, capsys):
    """The golden model's weights are random, and read."""
    _train(recipe_file, tmp_path / "warn")
    assert "guessing has log 160 = 5.08" in capsys.readouterr().err
    with pytest.raises(SilentFailureError, match="first_loss_check is stop"):
        _train(recipe_file, tmp_path / "stop", "first_loss_check=stop")
    _train(recipe_file, tmp_path / "random", "first_loss_check=stop", "init_weights=random")
    assert "guessing" not in capsys.readouterr().err


def test_windows_without_a_target_end_the_run(recipe_file, tmp_path):
    keys = ["noise_range_low=0", "noise_range_high=1e-9", "complementary=false", "max_steps=20"]
    with pytest.raises(SilentFailureError, match="the windows of the last 10 steps up to 10 held not one target"):
        _train(recipe_file, tmp_path, *keys)
    assert read_metrics(tmp_path, "targets") == [0] * 9


def test_answers_without_an_end_are_told(recipe_file, tmp_path, capsys):
    """Documents of whole blocks get no EOS as fill; the others' EOS are not learnt by a model that hardly moves."""
    endless = tmp_path / "endless.jsonl"
    rows = [{"input_ids": list(range(24)), "prompt_lengths": 8} for _ in range(8)]
    endless.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = _train(recipe_file, tmp_path / "endless", f"datasets=[{{path: {endless}}}]")
    assert "eos_hit_rate" not in rows[0]
    assert "EOS was never to be predicted in the 2 steps up to 2" in capsys.readouterr().err
    rows = _train(recipe_file, tmp_path / "unlearnt")
    assert rows[1]["eos_hit_rate"] == 0.0
    assert "EOS was never the most probable token" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [False, True])
def test_experts_that_nobody_is_routed_to_are_told(recipe_file, tmp_path, capsys, broken):
    model = tmp_path / "model"
    shutil.copytree(GOLDEN, model)
    tensors = load_file(GOLDEN / "model.safetensors")
    corrections = [name for name in tensors if name.endswith("gate.expert_bias")]
    assert corrections
    if broken:
        for name in corrections:
            tensors[name][3] = -1e9
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    keys = [f"model_name_or_path={model}", "expert_coverage_steps=2", "gradient_accumulation_steps=2"]
    rows = _train(recipe_file, tmp_path / "run", *keys)
    told = capsys.readouterr().err
    assert "experts_unused" not in rows[0]
    assert ("experts were never routed to in the steps up to 2" in told) == broken, rows[1]["experts_unused"]
    assert (rows[1]["experts_unused"] > 0) == broken


def test_a_layer_that_saw_few_tokens_is_not_told():
    """The last one runs at the targets alone, and may get too few of them to visit every expert."""
    coverage = ExpertCoverage(load_policy(GOLDEN))
    first, *_, last = coverage.seen
    for seen in coverage.seen.values():
        seen[:] = True
        seen[3] = False
    coverage.choices[first] = VISITS * len(coverage.seen[first])
    coverage.choices[last] = VISITS * len(coverage.seen[last]) - 1
    metrics, (told,) = coverage.take(7)
    assert f"{first} expert 3;" in told
    assert "1 of" in told
    assert metrics["experts_unused"] == len(coverage.seen) / sum(map(len, coverage.seen.values()))
    assert coverage.take(8)[1] == []  # counted anew
