"""One table of attention patterns: which learns what of the quickstart's tasks in the same CPU time.

    dfactory bench patterns --output runs/patterns

A pattern is a recipe in recipes/patterns/: a small model of the family that stands for it, in the family's own format, with
layers of equal width and about as many parameters as the others; tokenizer and chat template are the embedded model's. With
`--start random` its weights are drawn. With `--start base` every pattern starts from the embedded base model instead: in
that process the base attends, shifts and corrupts as the pattern's family does. The base was trained block-causal and
without a shift, so this compares what the patterns make of that base, and is no ranking of patterns.

A run trains on the quickstart's records until its steps have used `--seconds` of CPU time. That is not the clock's: other
processes cost a run nothing. The learning rate is a function of the share that is used. Then the run answers the held-out
prompts as its recipe decodes. A run is a process of its own with one thread. A run that is there already is not repeated;
where it had other settings, the command is refused.

The tables have exact match on the held-out prompts, in all and by task, tokens per forward, and tokens per second of CPU
time; means over the seeds, and of exact match the standard deviation. No setting was tuned: learning rates are the
quickstart's, twice that from random weights.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from dfactory.console import plain_console
from dfactory.data.prompts import read_rows
from dfactory.inference import Pipeline
from dfactory.models.families.base import FAMILIES, Family
from dfactory.models.registry import load_policy, read_family
from dfactory.models.tiny import TINY_DIR, TINY_NAME
from dfactory.recipe import Recipe, load_recipe
from dfactory.rl.rewards.exact_match import same_text
from dfactory.runs.folder import RunFolder
from dfactory.train import Run
from dfactory.vocabulary import recipe_vocabulary

RECIPES = Path(__file__).parents[1] / "recipes/patterns"
PATTERNS = [file.stem for file in sorted(RECIPES.glob("*.yaml"))]
RESULT = "pattern.json"
BASE_LEARNING_RATE = 1e-3  # the quickstart's
OF_THE_MODEL = ("config.json", "generation_config.json", "model.safetensors")  # what is not the tokenizer's
COLUMNS = ("steps", "records", "loss", "exact match", "tokens per forward", "tokens per second")


def write_model(name: str, directory: Path) -> Path:
    """A model directory without weights: the pattern's config.json, and the embedded model's tokenizer."""
    shutil.copytree(TINY_DIR, directory, ignore=shutil.ignore_patterns(*OF_THE_MODEL), dirs_exist_ok=True)
    shutil.copyfile(RECIPES / name / "config.json", directory / "config.json")
    return directory


def borrow_base(pattern: Family) -> None:
    """Make the embedded model's family attend, shift and corrupt as another one does, in this process."""
    base = read_family(TINY_DIR)
    facts = {
        name: getattr(pattern, name)
        for name in ("attention", "logit_shift", "noise", "block_size", "last_layer_at_targets")
    }
    FAMILIES._entries[base.name] = dataclasses.replace(base, **facts)


def learn(name: str, seed: int, options: argparse.Namespace, folder: Path) -> None:
    """Train one pattern, answer the held-out prompts, and leave the numbers in the run's folder."""
    model, seconds, overrides = write_model(name, folder / "model"), options.seconds, options.overrides
    of_run = [f"model_name_or_path={model}", f"seed={seed}", f"output_dir={folder / 'run'}"]
    if options.start == "base":
        borrow_base(read_family(model))
        of_run[0] = f"model_name_or_path={TINY_NAME}"
        of_run += ["init_weights=pretrained", f"learning_rate={BASE_LEARNING_RATE}"]
        of_run.append("self_conditioning=0")  # the base has no part that reads it
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*of_run, "overwrite_output_dir=true", *overrides])
    run = Run(RunFolder(recipe.output_dir), recipe, None)
    started, used, records = time.process_time(), 0.0, 0
    with run.logging():
        while used < seconds:
            run.trainer.go_to(int(run.num_steps * used / seconds))
            window = run.source.next_window()
            metrics = run.trainer.train_window(window, run.objective)
            run.state.step += 1
            records += sum(len(batch.document_id_D) for batch in window)
            used = time.process_time() - started
        run.save(last=True)
    found = {
        "settings": settings_of(options),
        "parameters": sum(parameter.numel() for parameter in run.trainer.policy.parameters()),
        "steps": run.state.step,
        "records": records,
        "loss": metrics["loss"],
    }
    (folder / RESULT).write_text(json.dumps(found | ask(recipe)) + "\n")


def ask(recipe: Recipe) -> dict[str, Any]:
    """Exact match, in all and by task, and the decoder's speed."""
    policy = load_policy(recipe.output_dir, dtype=recipe.dtype)
    pipeline = Pipeline.of(policy, recipe_vocabulary(recipe), recipe.decode_keys)
    rows = [row.fields for row in read_rows(recipe.eval_datasets[0].path)]
    prompts = [row["messages"][:-1] for row in rows]
    pipeline.generate(prompts[:2])  # what the first forward builds is no part of the speed
    started = time.process_time()
    answers = pipeline.generate(prompts)
    seconds = time.process_time() - started
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        hits[row["task"]].append(same_text(answer.text, row["answer"]))
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "exact match": statistics.fmean(hit for task in hits.values() for hit in task),
        "tokens per forward": tokens / sum(answer.forwards for answer in answers),
        "tokens per second": tokens / seconds,
        "tasks": {task: statistics.fmean(of_task) for task, of_task in sorted(hits.items())},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument(
        "--start", choices=("random", "base"), default="base", help="the weights that a run starts from"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=90.0, help="CPU time of a run's steps")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each has one thread")
    parser.add_argument("--one", action="store_true", help="a single run, in this process")
    parser.add_argument("overrides", nargs="*", help="key=value, of all runs")
    options = parser.parse_args(argv)
    places = [(name, seed) for seed in options.seeds for name in options.patterns]
    folders = {(name, seed): options.output / f"{name}-{options.start}-{seed}" for name, seed in places}
    if options.one:
        (((name, seed), folder),) = folders.items()
        learn(name, seed, options, folder)
        return 0
    missing = [(*place, options, folder) for place, folder in folders.items() if is_missing(folder, options)]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: start(*run), missing))
    show({place: json.loads((folder / RESULT).read_text()) for place, folder in folders.items()}, options)
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers of a run depend on beside its pattern, start and seed."""
    return {"seconds": options.seconds, "overrides": options.overrides}


def is_missing(folder: Path, options: argparse.Namespace) -> bool:
    """Whether a run has no result yet. Ends the program where it has one with other settings."""
    file = folder / RESULT
    if not file.is_file():
        return True
    found, wanted = json.loads(file.read_text())["settings"], settings_of(options)
    if found != wanted:
        raise SystemExit(f"{folder} was measured with {found}, and this is {wanted}: take another --output")
    return False


def start(name: str, seed: int, options: argparse.Namespace, folder: Path) -> None:
    """A run in a process of its own with one thread."""
    words = ["--one", "--patterns", name, "--seeds", seed, "--start", options.start]
    words += ["--seconds", options.seconds, "--output", options.output]
    command = [sys.executable, "-m", "benchmarks.patterns", *map(str, words), "--", *options.overrides]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=one_thread, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}, ended with status {done.returncode}: see {folder / 'log'}")


def show(found: dict[tuple[str, int], dict[str, Any]], options: argparse.Namespace) -> None:
    by_pattern = {name: [found[name, seed] for seed in options.seeds] for name in options.patterns}
    tasks = list(next(iter(found.values()))["tasks"])
    title = (
        f"{options.seconds:g} s of CPU time from {options.start} weights, seeds {', '.join(map(str, options.seeds))}"
    )
    table, by_task = Table("pattern", "parameters", *COLUMNS, title=title), Table("exact match", *tasks)
    for name, runs in by_pattern.items():
        table.add_row(name, f"{runs[0]['parameters']:,}", *cells(runs))
        by_task.add_row(name, *(f"{statistics.fmean(run['tasks'][task] for run in runs):.0%}" for task in tasks))
    console = plain_console()
    console.print(table)
    console.print(by_task)


def cells(runs: list[dict[str, Any]]) -> list[str]:
    """Of a pattern's row, in the order of COLUMNS."""
    steps, records, loss, right, per_forward, per_second = (
        statistics.fmean(run[column] for run in runs) for column in COLUMNS
    )
    spread = f" ± {statistics.stdev(run['exact match'] for run in runs):.1%}" if len(runs) > 1 else ""
    speed = [f"{per_forward:.2f}", f"{per_second:,.0f}"]
    return [f"{steps:.0f}", f"{records:,.0f}", f"{loss:.3f}", f"{right:.1%}{spread}", *speed]


if __name__ == "__main__":
    sys.exit(main())
