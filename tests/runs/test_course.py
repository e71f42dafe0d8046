"""What evaluations decide: the best checkpoint, the end of a run that no longer gets better, and the rules between their
keys. tests/engine/test_course.py has real runs."""

import json
import math

import pytest

from dfactory.errors import ConfigError
from dfactory.models.hub import resolve
from dfactory.recipe import load_recipe
from dfactory.runs.course import last_is_best, stale_evaluations
from dfactory.runs.folder import RunFolder


@pytest.mark.parametrize(
    "values, smaller, threshold, stale",
    [
        ([], True, 0.0, 0),
        ([3.0], True, 0.0, 0),
        ([3.0, 2.0, 2.5, 1.95], True, 0.1, 2),  # 1.95 is better than 2.0 by less than the threshold
        ([3.0, 2.0, 2.5, 1.95], True, 0.0, 0),
        ([0.5, 0.5, 0.6, 0.6, 0.4], False, 0.0, 2),
        ([1.0, math.nan, math.nan], True, 0.0, 2),
    ],
)
def test_evaluations_since_the_best_one(values, smaller, threshold, stale):
    assert stale_evaluations(values, smaller, threshold) == stale


def test_the_last_one_is_the_best_only_if_it_is_better_than_all():
    assert last_is_best([2.0, 1.0], smaller_is_better=True)
    assert not last_is_best([1.0, 1.0], smaller_is_better=True)
    assert not last_is_best([], smaller_is_better=True)


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path, recipe_file):
    folder = RunFolder(tmp_path / "run")
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        state = folder.checkpoint(step) / "engine/state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")
        folder.append_metrics({"step": step, "eval/loss": loss})
    folder.latest_file.write_text("checkpoint-3\n")
    assert resolve(folder.path).name == "checkpoint-3"
    assert str(folder.name_best("eval/loss", smaller_is_better=True)) == "checkpoint-2 (2)"
    assert resolve(folder.path).name == "checkpoint-2"
    assert folder.resume_candidates(True, overwrite=False)[0].name == "checkpoint-3"
    assert folder.name_best("eval/hit_rate", smaller_is_better=False) is None
    folder.start(load_recipe(recipe_file, [f"output_dir={folder.path}"]), 3)  # a run that goes on has no best one yet
    assert resolve(folder.path).name == "checkpoint-3"
    assert [json.loads(line)["step"] for line in folder.metrics_file.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    "keys, told",
    [
        (["save_strategy=epoch", "save_steps=4"], "save_steps 4 with save_strategy epoch: set save_steps to null"),
        (["eval_strategy=no", "eval_steps=4"], "eval_steps 4 with eval_strategy no"),
        (["load_best_model_at_end=true", "save_steps=3", "eval_steps=2"], "make save_steps a multiple of eval_steps"),
        (["load_best_model_at_end=true", "save_steps=3", "eval_strategy=epoch"], "take epoch for both"),
        (["load_best_model_at_end=true", "metric_for_best_model=null"], "only evaluations are compared"),
        (["save_strategy=best", "metric_for_best_model=loss"], "save_strategy best with metric_for_best_model loss"),
        (["early_stopping_patience=2", "eval_datasets=[]"], "early_stopping_patience 2 and no eval_datasets"),
        (["early_stopping_patience=2", "eval_strategy=no"], "early_stopping_patience 2 with eval_strategy no"),
        (["early_stopping_threshold=0.1"], "early_stopping_threshold 0.1 without early_stopping_patience"),
    ],
)
def test_rules_between_the_keys(recipe_file, keys, told):
    with pytest.raises(ConfigError, match=told):
        load_recipe(recipe_file, keys)


@pytest.mark.parametrize(
    "keys",
    [
        ["load_best_model_at_end=true"],
        ["load_best_model_at_end=true", "save_steps=4", "eval_steps=2"],
        ["load_best_model_at_end=true", "save_strategy=epoch", "eval_strategy=epoch"],
        ["load_best_model_at_end=true", "save_strategy=best", "eval_steps=3", "early_stopping_patience=1"],
    ],
)
def test_what_goes_together(recipe_file, keys):
    assert load_recipe(recipe_file, keys).load_best_model_at_end


def test_yaml_reads_a_bare_no_as_false(recipe_file):
    recipe = load_recipe(recipe_file, ["eval_strategy=no", "save_strategy=no"])
    assert (recipe.eval_strategy, recipe.save_strategy) == ("no", "no")
