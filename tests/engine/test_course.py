"""Runs that evaluate and save by epoch, after the best evaluation, and that end early; a resumed one decides the same."""

import json

import pytest

from dfactory.models.hub import resolve
from dfactory.runs.course import stale_evaluations

BASE = ["warmup_steps=0", "lr_scheduler_type=constant", "eval_noise_levels=[0.5]", "per_device_eval_batch_size=12"]
# the first step is far too large, and the second evaluation worse than the first
EARLY = [*BASE, "learning_rate=0.05", "eval_steps=1", "early_stopping_patience=1", "load_best_model_at_end=true"]

CALLBACK = """
import json
from dfactory.runs.callbacks import Callback


class Told(Callback):
    def __init__(self, recipe):
        self.file = recipe.output_dir + "/told.jsonl"

    def tell(self, *what):
        with open(self.file, "a") as file:
            file.write(json.dumps(what) + "\\n")

    def on_step(self, step, metrics):
        self.tell("step", step, metrics["loss"])

    def on_evaluate(self, step, metrics):
        self.tell("eval", step, metrics["loss"])

    def on_save(self, step, checkpoint):
        self.tell("save", step, checkpoint.name)
"""


@pytest.fixture(scope="module")
def runs(recipe_file, run_jobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    (folder / "told.py").write_text(CALLBACK)
    jobs = {
        "epochs": [
            *BASE,
            "max_steps=6",
            "eval_strategy=epoch",
            "save_strategy=epoch",
            "eval_on_start=true",
            f"callbacks=[{folder}/told.py:Told]",
        ],
        "early": [*EARLY, "save_steps=1"],
        "best": [*EARLY, "save_strategy=best"],
        "broken_off": [*BASE, "learning_rate=0.05", "eval_steps=1", "save_steps=1", "max_steps=1"],
        "resumed": [*EARLY, "save_steps=1", "resume_from_checkpoint=true"],
    }
    where = {name: folder / ("broken_off" if name == "resumed" else name) for name in jobs}
    run_jobs(1, [(recipe_file, [*keys, f"output_dir={where[name]}"]) for name, keys in jobs.items()])
    return where


def _rows(run, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def _saved(run) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


@pytest.mark.slow
def test_the_end_of_each_epoch(runs):
    epochs = _rows(runs["epochs"], "epoch")
    ends = [step for step, epoch in epochs.items() if int(epoch + 1e-4) > int(epochs.get(step - 1, 0) + 1e-4)]
    assert len(ends) >= 2
    assert sorted(_rows(runs["epochs"], "eval/loss")) == sorted({0, 6, *ends})  # eval_on_start is step 0
    assert _saved(runs["epochs"]) == sorted({6, *ends})


@pytest.mark.slow
def test_a_run_ends_when_evaluations_no_longer_get_better(runs):
    losses = _rows(runs["early"], "eval/loss")
    course = [losses[step] for step in sorted(losses)]
    stale = [stale_evaluations(course[:count], True) for count in range(1, len(course) + 1)]
    assert stale[-1] == 1
    assert max(stale[:-1]) < 1
    assert len(course) < 20
    assert _saved(runs["early"])[-1] == len(course) == max(_rows(runs["early"], "loss"))
    best = min(losses, key=lambda step: losses[step])
    assert (runs["early"] / "BEST").read_text() == f"checkpoint-{best}\n"
    assert resolve(runs["early"]).name == f"checkpoint-{best}"


@pytest.mark.slow
def test_only_the_best_and_the_last_are_saved(runs):
    losses = _rows(runs["best"], "eval/loss")
    assert losses == _rows(runs["early"], "eval/loss")
    better = [step for step in losses if losses[step] < min([losses[s] for s in losses if s < step], default=9e9)]
    assert _saved(runs["best"]) == sorted({*better, max(losses)})


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_undisturbed_one_does(runs):
    assert _rows(runs["resumed"], "eval/loss") == _rows(runs["early"], "eval/loss")
    assert (runs["resumed"] / "BEST").read_text() == (runs["early"] / "BEST").read_text()


@pytest.mark.slow
def test_callbacks_are_told_of_steps_evaluations_and_checkpoints(runs):
    told = [json.loads(line) for line in (runs["epochs"] / "told.jsonl").read_text().splitlines()]
    for hook, name in (("step", "loss"), ("eval", "eval/loss")):
        assert {step: value for kind, step, value in told if kind == hook} == _rows(runs["epochs"], name)
    assert [value for kind, _, value in told if kind == "save"] == [f"checkpoint-{n}" for n in _saved(runs["epochs"])]
