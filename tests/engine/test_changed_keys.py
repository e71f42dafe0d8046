"""Keys that change on resuming: applied from the next step on, under every ZeRO stage, or refused by name."""

import json

import pytest
import torch
import yaml

from dfactory.assembly import make_source, read_inputs
from dfactory.cli import main
from dfactory.data.source import RecordSource
from dfactory.engine.checkpoint import resume_from
from dfactory.engine.schedule import learning_rate_schedule
from dfactory.errors import CheckpointError, ConfigError
from dfactory.recipe import load_recipe
from dfactory.train import train
from tests.engine.conftest import GOLDEN, read_metrics
from tests.engine.test_equality import ZERO
from tests.reference import reference_losses

BASE = ["eval_datasets=[]", "warmup_steps=0", "lr_scheduler_type=linear"]
BEFORE = [*BASE, "max_steps=4", "learning_rate=1e-3", "weight_decay=0.1"]
LONGER = [*BASE, "max_steps=8", "learning_rate=1e-3", "weight_decay=0.1"]
OTHER = [*BASE, "max_steps=8", "learning_rate=4e-3", "lr_min=1e-4", "weight_decay=0.5", "max_grad_norm=0.05"]
OTHER += ["adam_beta1=0.5", "adam_beta2=0.9", "adam_epsilon=1e-6"]


def _rates(recipe, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule, rates = learning_rate_schedule(recipe, optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def _plain(recipe_file, then: list[str]) -> tuple[list[float], list[float]]:
    """(learning rates, losses) of steps 5 to 8 in plain torch, which changes its hyperparameters after step 4."""
    recipes = [load_recipe(recipe_file, keys) for keys in (BEFORE, then)]
    source = make_source(recipes[0], read_inputs(recipes[0]), rank=0, world_size=1)
    of_step = [recipes[0]] * 4 + [recipes[1]] * 4
    rates = _rates(recipes[0], 4) + _rates(recipes[1], 8)[4:]
    losses = reference_losses(
        GOLDEN,
        [source.next_window() for _ in of_step],
        rates,
        betas=[(recipe.adam_beta1, recipe.adam_beta2) for recipe in of_step],
        eps=[recipe.adam_epsilon for recipe in of_step],
        weight_decay=[recipe.weight_decay for recipe in of_step],
        max_grad_norm=[recipe.max_grad_norm for recipe in of_step],
    )
    return rates[4:], losses[4:]


@pytest.mark.slow
def test_changed_hyperparameters_and_steps_are_those_of_plain_torch(recipe_file, run_jobs, tmp_path):
    """ZeRO 0 to 3; from one rank as the shards lie, from two through the universal format. A longer linear decay goes on
    where it stands, so that step 5 of 8 has half of the peak."""
    alone = {stage: tmp_path / f"alone-{stage}" for stage in (0, 1, 2, 3)}
    pairs = {stage: tmp_path / f"pair-{stage}" for stage in (1, 2, 3)}
    for ranks, runs in ((1, alone), (2, pairs)):
        rows = f"per_device_train_batch_size={8 // ranks}"
        run_jobs(ranks, [(recipe_file, [*BEFORE, ZERO[s], f"output_dir={run}", rows]) for s, run in runs.items()])
    jobs, told = [], {}
    for name, keys in (("longer", LONGER), ("other", OTHER)):
        for stage, run in [*alone.items(), *pairs.items()]:
            goes_on = tmp_path / f"{run.name}-{name}"
            start = f"resume_from_checkpoint={run}/checkpoint-4"
            jobs.append((recipe_file, [*keys, ZERO[stage], f"output_dir={goes_on}", start]))
            told[goes_on] = name
    said = run_jobs(1, jobs)
    plain = {"longer": _plain(recipe_file, LONGER), "other": _plain(recipe_file, OTHER)}
    assert plain["longer"][0][0] == pytest.approx(5e-4)
    for run, name in told.items():
        rates, losses = plain[name]
        assert read_metrics(run, "learning_rate") == pytest.approx(rates), run.name
        difference = (torch.tensor(read_metrics(run)) - torch.tensor(losses)).abs().max().item()
        assert difference < 1e-5, f"{run.name}: losses differ by {difference:.2e}"
    assert "changed since: max_steps 4 -> 8\n" in said
    assert "learning_rate 0.001 -> 0.004; lr_min 0 -> 0.0001; weight_decay 0.1 -> 0.5" in said


@pytest.fixture(scope="module")
def finished(recipe_file, tmp_path_factory):
    """An epoch of about eleven rows, one a step, in a run that saved at each third."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(load_recipe(recipe_file, [*EPOCH, "per_device_train_batch_size=1", f"output_dir={run}"])) == 0
    return run


EPOCH = ["max_steps=null", "num_train_epochs=1", "save_steps=3", "warmup_steps=0"]


def _rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rows", [4, 1])
def test_an_epoch_goes_on_with_another_batch_size(recipe_file, finished, tmp_path, rows, capsys):
    """Steps are what is done and what is left: every record is seen once, and the end is evaluated and saved."""
    steps = len([row for row in _rows(finished) if "loss" in row])
    assert steps > 8
    at, run = 6, tmp_path / "run"
    start = [f"resume_from_checkpoint={finished}/checkpoint-{at}", f"output_dir={run}"]
    assert train(load_recipe(recipe_file, [*EPOCH, f"per_device_train_batch_size={rows}", *start])) == 0
    last = at + -(-(steps - at) // rows)
    trained = [row for row in _rows(run) if "loss" in row]
    assert [row["step"] for row in trained] == list(range(at + 1, last + 1))
    assert trained[-1]["epoch"] == 1.0
    assert _rows(run)[-1]["step"] == last
    assert "eval/loss" in _rows(run)[-1]
    assert (run / "LATEST").read_text() == f"checkpoint-{last}\n"
    both = [row for row in _rows(finished)[:at] if "loss" in row] + trained
    assert sum(row["targets"] for row in both) == sum(row["targets"] for row in _rows(finished) if "loss" in row)
    assert f"{last} steps from step {at}" in capsys.readouterr().out


def test_a_source_that_ends_early_is_evaluated_and_saved(recipe_file, tmp_path, monkeypatch, capsys):
    take = RecordSource.next_window

    def ending(self):
        return take(self) if self.rows_per_window != 3 or self.state_dict()["windows"] < 2 else None

    monkeypatch.setattr(RecordSource, "next_window", ending)
    keys = ["max_steps=5", "warmup_steps=0", "per_device_train_batch_size=3", f"output_dir={tmp_path}"]
    assert train(load_recipe(recipe_file, keys)) == 0
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 2]
    assert "eval/loss" in _rows(tmp_path)[-1]
    assert (tmp_path / "LATEST").read_text() == "checkpoint-2\n"
    assert "the records ended at step 2 of 5" in capsys.readouterr().err


def test_what_ran_before_is_kept_and_what_must_stay_is_refused(recipe_file, finished, tmp_path, capsys):
    run, start = tmp_path / "run", f"resume_from_checkpoint={finished}/checkpoint-9"
    keys = [*EPOCH, f"output_dir={run}", start]
    with pytest.raises(ConfigError, match=r"cannot change dtype float32 -> bfloat16: .*; seed 42 -> 7: noise"):
        train(load_recipe(recipe_file, [*keys, "seed=7", "dtype=bfloat16"]))
    with pytest.raises(ConfigError, match=r"max_steps 8, but .*checkpoint-9 has done 9"):
        train(load_recipe(recipe_file, [*keys, "max_steps=8"]))
    with pytest.raises(CheckpointError, match=r"is now .*changed since the checkpoint: max_length 40 -> 32"):
        train(load_recipe(recipe_file, [*keys, "max_length=32", "overlong=truncate"]))
    assert main(["train", str(recipe_file), *keys, "mask_token_id=157"]) == 2
    assert "cannot change mask_token_id 158 -> 157: the model has learnt" in capsys.readouterr().err
    assert not run.exists()
    assert train(load_recipe(recipe_file, [*keys, "learning_rate=1e-4"])) == 0
    before = yaml.safe_load((run / "config.until-step-9.yaml").read_text())
    now = yaml.safe_load((run / "config.yaml").read_text())
    assert (before["learning_rate"], now["learning_rate"]) == (1e-3, 1e-4)
    saved = sorted(run.glob("checkpoint-*"))[-1]
    assert resume_from(saved, load_recipe(recipe_file, [*keys, "learning_rate=1e-4"])).changes == []
