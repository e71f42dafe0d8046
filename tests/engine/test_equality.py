"""However DeepSpeed shards the work, and however a batch is cut, the losses are those of plain torch."""

import functools
import json
from pathlib import Path

import pytest
import torch

from dfactory.assembly import make_source, read_inputs
from dfactory.engine.schedule import learning_rate_schedule
from dfactory.recipe import Recipe, load_recipe
from tests.engine.conftest import GOLDEN, ROOT, read_metrics, write_records
from tests.reference import reference_losses

ZERO = {stage: f"deepspeed={ROOT}/recipes/deepspeed/zero{stage}.json" for stage in (1, 2, 3)} | {0: "deepspeed=null"}


def plain_losses(recipe_file: Path, overrides: list[str] = ()) -> list[float]:
    """The losses of a recipe, by tests/reference.py."""
    return _plain_losses(recipe_file, tuple(overrides))


@functools.cache  # slow, and the same for any number of processes
def _plain_losses(recipe_file: Path, overrides: tuple[str, ...]) -> list[float]:
    recipe = load_recipe(recipe_file, list(overrides))
    steps = recipe.max_steps
    source = make_source(recipe, read_inputs(recipe), rank=0, world_size=1)
    windows = [source.next_window() for _ in range(steps)]
    rates = scheduled_rates(recipe)
    preference = {"preference_beta": recipe.beta, "sft_loss_coef": recipe.sft_loss_coef}
    confidence = {"confidence_beta": recipe.confidence_beta, "entropy_temperature": recipe.entropy_temperature}
    return reference_losses(
        GOLDEN,
        windows,
        rates,
        weight_decay=recipe.weight_decay,
        loss_weight=recipe.loss_weight,
        max_grad_norm=recipe.max_grad_norm,
        embedding_max_grad_norm=recipe.embedding_max_grad_norm,
        **{"cap": confidence, "dpo": preference}.get(recipe.stage, {}),
    )


def scheduled_rates(recipe: Recipe) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule = learning_rate_schedule(recipe, optimizer, recipe.max_steps)
    rates = []
    for _ in range(recipe.max_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def weighted_keys(folder: Path) -> list[str]:
    """Overrides for records of which every third has a weight."""
    plain, weighted = write_records(folder / "plain.jsonl", 40, seed=1), folder / "weighted.jsonl"
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    weights = [{"weight": 0.5 + number / 10} if number % 3 == 0 else {} for number in range(len(rows))]
    weighted.write_text("".join(json.dumps(row | one) + "\n" for row, one in zip(rows, weights, strict=True)))
    return [f"datasets=[{{path: {weighted}}}]"]


OBJECTIVES = {
    "sft": [],
    "elbo": ["loss_weight=elbo", "noise_level=document"],
    "cap": ["stage=cap", "confidence_beta=0.5", "entropy_temperature=0.5"],
    "ends": ["max_steps=6", "embedding_max_grad_norm=0.5", "max_grad_norm=2.0"],
    "tokens": ["max_steps=6", "gradient_accumulation_tokens=120"],  # and records with weights
    "dpo": ["max_steps=4", "learning_rate=1e-4", "sft_loss_coef=0.1"],  # and pairs
}
SPLITS = {1: [(8, 1), (1, 8)], 2: [(2, 2)]}  # processes -> rows and accumulation of the same 8 rows
OTHERS = {  # processes -> (objective, ZeRO stage, rows, accumulation)
    1: [("elbo", 1, 8, 1), ("cap", 0, 8, 1), ("dpo", 0, 1, 8), ("tokens", 0, 2, 1), ("ends", 0, 4, 2)],
    2: [
        ("elbo", 1, 4, 1),
        ("cap", 3, 2, 2),
        ("dpo", 3, 2, 2),
        ("tokens", 2, 2, 1),
        ("ends", 1, 2, 2),
        ("ends", 2, 2, 2),
        ("ends", 3, 2, 2),
    ],
}


def _variants(processes: int) -> list[tuple[str, int, int, int]]:
    """SFT at every ZeRO stage and split, another objective where it differs: it may need scores before it counts."""
    whole = [("sft", stage, *split) for stage in (0, 1, 2) for split in SPLITS[processes]]
    return [*whole, ("sft", 3, *SPLITS[processes][-1]), *OTHERS[processes]]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_losses_of_twenty_steps_equal_plain_torch(recipe_file, dpo_keys, run_jobs, tmp_path, processes):
    """ZeRO 0 to 3, and the splits 1 x 8, 8 x 1 and 2 x 2 x 2 (ranks x rows x accumulation) of the same 8 rows."""
    jobs, objectives = {}, OBJECTIVES | {"dpo": [*dpo_keys, *OBJECTIVES["dpo"]]}
    objectives["tokens"] = [*weighted_keys(tmp_path), *OBJECTIVES["tokens"]]
    for objective, stage, rows, accumulation in _variants(processes):
        run = tmp_path / f"{objective}-zero{stage}-{rows}x{accumulation}"
        split = [f"per_device_train_batch_size={rows}", f"gradient_accumulation_steps={accumulation}"]
        jobs[run] = [ZERO[stage], f"output_dir={run}", *split, *objectives[objective]]
    run_jobs(processes, [(recipe_file, overrides) for overrides in jobs.values()])

    for objective, overrides in objectives.items():
        expected = torch.tensor(plain_losses(recipe_file, overrides))
        for run in (run for run in jobs if run.name.startswith(objective)):
            difference = (torch.tensor(read_metrics(run)) - expected).abs().max().item()
            assert difference < 1e-5, f"{run.name}: losses differ by {difference:.2e}"
    hits = read_metrics(next(run for run in jobs if run.name.startswith("cap")), "hit_rate")
    assert all(rate > 0 for rate in hits)  # else the confidence term was not met


@pytest.mark.slow
def test_embedding_and_head_are_clipped_apart_in_bfloat16(recipe_file, run_jobs, tmp_path):
    """Where they alone are trained, the global norm is what they were clipped to. Two ranks, on which each optimiser keeps
    its gradients in another way."""
    only_ends = [
        "dtype=bfloat16",
        "frozen_parameters=[layers,'model.norm']",
        "embedding_max_grad_norm=0.01",
        "max_steps=2",
    ]
    runs = {stage: tmp_path / str(stage) for stage in (1, 2)}
    split = ["per_device_train_batch_size=2", "gradient_accumulation_steps=2"]
    run_jobs(2, [(recipe_file, [ZERO[stage], f"output_dir={run}", *split, *only_ends]) for stage, run in runs.items()])
    for run in runs.values():
        assert min(read_metrics(run, "embedding_grad_norm")) > 1
        assert read_metrics(run, "grad_norm") == pytest.approx([0.01, 0.01], rel=1e-3)
