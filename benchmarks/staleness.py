"""What stale rollouts cost, and what their correction recovers: RL of the quickstart by the age of its rollouts.

    python -m benchmarks.staleness --output runs/benchmark_staleness

trains recipes/quickstart/sft.yaml for each seed and from it recipes/quickstart/rl.yaml

    with       the ratio's denominator is the policy that decoded, tokens have truncated importance weights: the default
    without    old_policy=learner importance_cap=null: rollouts are trained on as if the learner had decoded them
    decoupled  old_policy=learner: the weights alone correct (AReaL)

How old rollouts are in a run on Ray depends on how fast its processes are. Here controller, rollout actor and learner share
a process, and the actor decodes with weights that are `max_staleness` versions old, always: the worst that the controller
would allow, and the same in every repetition. Training loop, controller, decoder and rewards are those of any run.

Printed, as mean and standard deviation over seeds: the mean staleness, the move of a target's log-probability, the
share of clipped ratios, the weights' distance from 1, the reward on held-out requests at the end (sampled as in
training; of 200, so 3.5 points are a standard error of one run), and the mean reward of the rollouts in the last
third of the steps. A run that is there already is not repeated.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.local_client import LocalCall, LocalClient, Weights, copy_weights
from dfactory.algorithms import Data
from dfactory.recipe import Recipe, load_recipe
from dfactory.rl.actors import RolloutActor
from dfactory.rl.weights import WeightSet
from dfactory.train import learn

RECIPES = Path(__file__).parents[1] / "recipes" / "quickstart"
ARMS = {
    "with": [],
    "without": ["old_policy=learner", "importance_cap=null"],
    "decoupled": ["old_policy=learner"],
}
TIMEOUT_S = 3600


class OldActor:
    """A rollout actor that takes the weights which are `age` versions old."""

    def __init__(self, recipe: Recipe, age: int):
        self.actor, self.age = RolloutActor(recipe, "."), age
        self.versions: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.process, self.set_weights = LocalCall(lambda: None), LocalCall(self._take)
        self.generate = LocalCall(self.actor.generate)

    def keep(self, version: int, groups: Weights) -> None:
        state = {name: tensor.clone() for group in groups for name, tensor in group.items()}
        self.versions = [*self.versions, (version, state)][-1 - self.age :]

    def _take(self, weights: WeightSet) -> None:
        self.actor.version, state = self.versions[0]
        copy_weights(self.actor.policy, [state])


class OldWeights(LocalClient):
    """The actor's weights are `max_staleness` versions old; the controller is synchronous."""

    def __init__(self, recipe: Recipe):
        super().__init__(
            dataclasses.replace(recipe, max_staleness=0), OldActor(recipe, recipe.max_staleness), TIMEOUT_S
        )

    def publish(self, version: int, groups: Weights) -> dict[str, float]:
        self.actor.keep(version, groups)
        return super().publish(version, groups)


def train(recipe_file: str, folder: Path, overrides: list[str]) -> None:
    """A run of the recipe, to its end; `finished` is left there."""
    finished = folder / "finished"
    if finished.is_file():
        return
    recipe = load_recipe(RECIPES / recipe_file, [f"output_dir={folder}", "overwrite_output_dir=true", *overrides])
    client = OldWeights(recipe) if recipe.algorithm.data is Data.PROMPTS else None
    if status := learn(recipe, client):
        raise SystemExit(status)
    if client is not None:
        client.close()
    finished.touch()


def measure(folder: Path) -> dict[str, float]:
    """What a run's metrics say of it."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    last = steps[-(len(steps) // 3) or -1 :]
    return {
        "staleness": statistics.fmean(row["staleness"] for row in steps),
        "nats moved": statistics.fmean(row["logprob_change"] for row in steps),
        "clipped": statistics.fmean(row["clip_ratio"] for row in steps),
        "weight - 1": statistics.fmean(row.get("importance_gap", 0.0) for row in steps),
        "held-out reward": [row["eval/exact_match"] for row in rows if "eval/exact_match" in row][-1],
        "last third": statistics.fmean(row["reward"] for row in last),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["with", "without"])
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("overrides", nargs="*", help="key=value, of the RL runs")
    options = parser.parse_args(argv)
    keys = [*options.overrides, f"max_steps={options.steps}", f"eval_steps={options.steps}"]
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for seed in options.seeds:
        start = options.output / f"sft-{seed}"
        train("sft.yaml", start, [f"seed={seed}"])
        for staleness in options.staleness:
            for arm in options.arms if staleness else options.arms[:1]:  # of age 0 there is nothing to correct
                folder = options.output / f"rl-{seed}-{staleness}-{arm}"
                of_run = [f"seed={seed}", f"max_staleness={staleness}", f"model_name_or_path={start}", *ARMS[arm]]
                train("rl.yaml", folder, [*keys, *of_run])
                found.setdefault((staleness, arm), []).append(measure(folder))
    show(found)
    return 0


def show(found: dict[tuple[int, str], list[dict[str, float]]]) -> None:
    names = list(next(iter(found.values()))[0])
    table = Table("max_staleness", "correction", *names)
    for (staleness, arm), runs in sorted(found.items()):
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        table.add_row(str(staleness), arm, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
