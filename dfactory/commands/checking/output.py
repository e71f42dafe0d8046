"""Section `output`: what is written where, and whether there is room."""

import os
import shutil
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dfactory.algorithms import Data
from dfactory.commands.checking.model import Model
from dfactory.commands.checking.page import Page, in_bytes
from dfactory.engine.checkpoint import problems_without_reading, resume_from
from dfactory.engine.trainer import deepspeed_config
from dfactory.errors import ConfigError
from dfactory.planning.start import checkpoints_of
from dfactory.recipe import Recipe
from dfactory.runs.folder import RunFolder
from dfactory.runs.trackers import check_trackers


def tell_output(page: Page, recipe: Recipe, model: Model | None, steps: int | None) -> None:
    folder = RunFolder(recipe.output_dir)
    check_trackers(recipe)
    parent = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output_dir {folder.path}: {parent} is not a directory that can be written: choose another")
    page.line("output_dir", f"{folder.path}/", _files(recipe))
    candidates = folder.resume_candidates(recipe.resume_from_checkpoint, recipe.overwrite_output_dir)
    resumed, warnings = folder.first_whole(candidates, problems_without_reading)
    for warning in warnings:
        page.warn(warning)
    whole = folder.checkpoints()
    if resumed is not None:
        page.line("resumes", str(resumed), resume_from(resumed, recipe).summary)
    elif whole:
        page.warn(
            f"{folder.path} holds {len(whole)} checkpoint(s) up to {whole[-1].name}, and overwrite_output_dir is true: "
            "they will be removed"
        )
    page.line("checkpoints", f"{_often(recipe)}at the end; {_kept(recipe)}")
    if model is not None:
        _checkpoint_size(page, recipe, model, parent, steps or recipe.max_steps)


def _often(recipe: Recipe) -> str:
    """When checkpoints are written before the last one."""
    if recipe.save_strategy == "steps":
        return f"every {recipe.save_steps} steps and " if recipe.save_steps else ""
    return {"no": "", "epoch": "after each epoch and ", "best": "after each best evaluation and "}[recipe.save_strategy]


def _kept(recipe: Recipe) -> str:
    if recipe.save_total_limit is None:
        return "all are kept"
    newest = f"the newest {recipe.save_total_limit} are kept"
    metric = recipe.metric_for_best_model
    if metric is None or (metric.startswith("eval/") and not recipe.eval_datasets):
        return newest
    return f"{newest}, the one with the {'smallest' if recipe.smaller_is_better else 'largest'} {metric} among them"


def _files(recipe: Recipe) -> Table:
    files = {
        "config.yaml": "the recipe, resolved",
        "metrics.jsonl": "an object a step, and one an evaluation",
        "checkpoint-N/": "a directory that transformers loads; the engine's state in engine/",
        "LATEST": "the newest whole checkpoint",
        "report/": "curves, at the end: report.html and PNGs",
    }
    if recipe.load_best_model_at_end:
        files["BEST"] = "the best checkpoint, which the folder then stands for"
    if recipe.eval_datasets and recipe.eval_decode_prompts:
        files["previews.jsonl"] = "held-out prompts as they were answered, at each evaluation"
    if recipe.algorithm.data is Data.PROMPTS:
        files["completions.jsonl"] = "rollouts with their rewards"
        files["groups.jsonl"] = "which prompts each step met"
    if recipe.reference_kind == "precomputed" and recipe.reference_path is None:
        files["reference.safetensors"] = "the reference's scores"
    for name in recipe.report_to:
        files[f"{name}-id, {name}/"] = "of the tracker: its id of the run, and its files where it keeps them here"
    table = Table.grid(padding=(0, 2))
    for name, what in files.items():
        table.add_row(name, Text(what, "dim"))
    return table


def _checkpoint_size(page: Page, recipe: Recipe, model: Model, parent: Path, steps: int | None) -> None:
    plan = checkpoints_of(recipe, model.path, deepspeed_config(recipe), model.trained, steps, model.new_rows)
    free = shutil.disk_usage(parent).free
    page.line(
        "size",
        f"about {in_bytes(plan.each)} each, {in_bytes(plan.weights)} of it weights; {plan.written:,} are written, at most "
        f"{plan.kept:,} are there at a time: {in_bytes(plan.room)}; {in_bytes(free)} are free",
    )
    if free < plan.each:
        page.warn(f"a checkpoint takes about {in_bytes(plan.each)}, but {parent} has {in_bytes(free)} left")
    elif free < plan.room:
        page.warn(
            f"{plan.kept} checkpoints take about {in_bytes(plan.room)}, but {parent} has {in_bytes(free)} left: "
            "set save_total_limit"
        )
