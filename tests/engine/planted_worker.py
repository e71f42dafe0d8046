"""Trains with a NaN or Inf planted for real in one rank's loss or gradient: `torchrun ... planted_worker.py jobs.json`.

A job has a recipe, overrides and a plant: {"rank", "call" (of the objective, from 1; 0: never), "kind"}. Every rank writes
how its run ended into `output_dir`.rank-R.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dfactory import train
from dfactory.errors import NonFiniteError
from dfactory.recipe import load_recipe
from dfactory.types import LossTerms, Objective
from tests.rl.test_source import FakeClient

make_objective = train.make_objective


class Planted(Objective):
    """Another objective; at one call, every term of its loss is spoilt."""

    def __init__(self, inner: Objective, call: int, kind: str):
        self.inner, self.call, self.kind, self.calls = inner, call, kind, 0
        self.counts_need_scores, self.spans_micro_batches = inner.counts_need_scores, inner.spans_micro_batches
        self.counts = inner.counts

    def __call__(self, batch, scores) -> LossTerms:
        terms = self.inner(batch, scores)
        self.calls += 1
        if self.calls != self.call:
            return terms
        extra = {
            "nan": lambda: scores.logprob_N.sum() * torch.nan,
            "inf": lambda: torch.tensor(torch.inf),  # its gradient is that of the terms, and finite
            "gradient": lambda: (scores.logprob_N.sum() * 0).abs().sqrt(),  # 0, with 0 * inf as its gradient
        }[self.kind]()
        return LossTerms({n: mean._replace(total=mean.total + extra) for n, mean in terms.loss.items()}, terms.metrics)


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        recipe, plant = load_recipe(job["recipe"], job["overrides"]), job["plant"]

        def planted(recipe, inputs, plant=plant):
            objective = make_objective(recipe, inputs)
            return Planted(objective, plant["call"], plant["kind"]) if dist.get_rank() == plant["rank"] else objective

        train.make_objective = planted
        try:
            outcome = str(train.learn(recipe, FakeClient() if recipe.stage == "rl" else None))
        except NonFiniteError as problem:
            outcome = f"{problem.exit_status} {problem}"
        Path(f"{recipe.output_dir}.rank-{dist.get_rank()}").write_text(outcome)


if __name__ == "__main__":
    main()
