"""However DeepSpeed shards the work, and however a batch is cut, the losses are those of plain torch."""

from pathlib import Path

import pytest
import torch

from dfactory.config.load import load_recipe
from dfactory.engine.trainer import learning_rate_schedule
from dfactory.train import make_source, read_inputs
from tests.engine.conftest import GOLDEN, ROOT, read_metrics
from tests.reference import reference_losses

STEPS = 20
ZERO = {stage: f"deepspeed={ROOT}/recipes/deepspeed/zero{stage}.json" for stage in (1, 2, 3)} | {0: "deepspeed=null"}


def plain_losses(recipe_file: Path, overrides: list[str] = (), steps: int = STEPS) -> list[float]:
    """The losses of a recipe's first steps, by tests/reference.py."""
    recipe = load_recipe(recipe_file, list(overrides))
    source = make_source(recipe, read_inputs(recipe), rank=0, world_size=1)
    windows = [source.next_window() for _ in range(steps)]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule = learning_rate_schedule(recipe, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return reference_losses(GOLDEN, windows, rates, weight_decay=recipe.weight_decay, loss_weight=recipe.loss_weight)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_losses_of_twenty_steps_equal_plain_torch(recipe_file, run_jobs, tmp_path, processes):
    """ZeRO 0 to 3, and the splits 1 x 8, 8 x 1 and 2 x 2 x 2 (ranks x rows x accumulation) of the same 8 rows."""
    splits = {1: [(8, 1), (1, 8)], 2: [(2, 2)]}[processes]
    jobs = {}
    for stage in (0, 1, 2, 3):
        for rows, accumulation in splits if stage < 3 else splits[-1:]:
            run = tmp_path / f"zero{stage}-{rows}x{accumulation}"
            jobs[run] = [
                ZERO[stage],
                f"output_dir={run}",
                f"per_device_train_batch_size={rows}",
                f"gradient_accumulation_steps={accumulation}",
            ]
    elbo = tmp_path / "elbo"
    jobs[elbo] = [*jobs[tmp_path / f"zero1-{splits[-1][0]}x{splits[-1][1]}"][:1], f"output_dir={elbo}"]
    jobs[elbo] += [f"per_device_train_batch_size={8 // processes}", "loss_weight=elbo", "noise_level=document"]
    run_jobs(processes, [(recipe_file, overrides) for overrides in jobs.values()])

    expected = torch.tensor(plain_losses(recipe_file))
    for run in jobs:
        if run != elbo:
            difference = (torch.tensor(read_metrics(run)[:STEPS]) - expected).abs().max().item()
            assert difference < 1e-5, f"{run.name}: losses differ by {difference:.2e}"
    expected = torch.tensor(plain_losses(recipe_file, ["loss_weight=elbo", "noise_level=document"]))
    torch.testing.assert_close(torch.tensor(read_metrics(elbo)[:STEPS]), expected, rtol=0, atol=1e-5)
