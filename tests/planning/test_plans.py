"""The dry run by hand: steps and epochs by number of ranks, phases of a schedule, what checkpoints take, what would fit."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dfactory.planning.fit import FITS, at_stage, remedy_of
from dfactory.planning.memory import Setup, forecast
from dfactory.planning.start import checkpoints_of
from dfactory.planning.steps import phases_of, steps_on
from dfactory.recipe import Recipe

MINI = Path(__file__).parents[2] / "recipes/llada2_mini/model"
ROWS_AN_EPOCH = {4: 12, 8: 6}  # by block size


class PaperSource:
    """Rows that are half full, with two documents and three targets each; one row a batch."""

    def __init__(self, recipe: Recipe, ranks: int):
        self.left = int(ROWS_AN_EPOCH[recipe.block_phases[-1][1]] * recipe.num_train_epochs)
        rows = ranks * recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
        self.num_windows = -(-self.left // rows)

    def next_window(self):
        self.left -= 1
        if self.left < 0:
            return None
        document_RS = torch.tensor([[0, 0, 1, 1, -1, -1, -1, -1]])
        return [SimpleNamespace(document_RS=document_RS, num_tokens=4, num_targets=3, document_id_D=torch.arange(2))]


def recipe(**keys) -> Recipe:
    options = {
        "block_size": 8,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3.0,
    }
    return Recipe(**{**options, **keys})


def test_steps_and_epochs():
    plain = recipe()
    (phase,) = phases_of(plain, PaperSource)
    assert (phase.epoch_rows, phase.rows, phase.fill) == (6, 18, 0.5)
    assert (phase.tokens, phase.targets, phase.documents) == (4, 3, 2)
    found = [
        (p.ranks, p.rows, p.steps, p.epochs, p.steps_an_epoch, p.tokens)
        for p in steps_on(plain, PaperSource, [phase], (1, 4))
    ]
    assert found == [(1, 2, 9, 3.0, 3, 8), (4, 8, 3, 3.0, 1, 32)]


def test_steps_that_are_cut_by_tokens():
    """Their number is the source's on any number of ranks, a step's rows the mean of an epoch."""

    class ByTokens(PaperSource):
        def __init__(self, recipe: Recipe, ranks: int):
            super().__init__(recipe, ranks)
            if recipe.gradient_accumulation_tokens is not None:
                self.num_windows = round(4 * recipe.num_train_epochs)

    by_tokens = recipe(gradient_accumulation_steps=1, gradient_accumulation_tokens=100)
    (phase,) = phases_of(by_tokens, ByTokens)
    found = [(p.ranks, p.rows, p.steps, p.steps_an_epoch) for p in steps_on(by_tokens, ByTokens, [phase], (1, 4))]
    assert found == [(1, 1.5, 12, 4), (4, 1.5, 12, 4)]


def test_epochs_of_a_schedule_add_up_over_its_phases():
    """Two steps of two rows at 12 rows an epoch, then one at 6."""
    scheduled = recipe(block_size_schedule=[[0, 4], [2, 8]], max_steps=3)
    phases = phases_of(scheduled, PaperSource)
    assert [(phase.first, phase.block_size, phase.epoch_rows) for phase in phases] == [(0, 4, 12), (2, 8, 6)]
    (plan,) = steps_on(scheduled, PaperSource, phases, (1,))
    assert plan.steps == 3
    assert plan.epochs == pytest.approx(4 / 12 + 2 / 6)


def test_what_checkpoints_take():
    """bfloat16 weights twice, and what AdamW keeps."""
    keys = {"dtype": "bfloat16", "save_steps": 10, "save_total_limit": 2}
    plan = checkpoints_of(recipe(**keys), MINI, {"zero_optimization": {"stage": 0}}, trained=1000, steps=95)
    assert (plan.weights, plan.written, plan.kept) == (2000, 10, 3)  # a new one is written before the oldest goes
    assert plan.room == 3 * plan.each
    assert checkpoints_of(recipe(), MINI, {"zero_optimization": {"stage": 0}}, trained=1000, steps=None).kept == 1


def test_the_first_change_that_fits():
    setup = Setup(world_size=8, zero_stage=0, gradient_checkpointing=True)
    assert forecast(MINI, setup).device_bytes > FITS
    words, memory = remedy_of(MINI, recipe(), setup)
    assert words == "deepspeed=recipes/deepspeed/zero3.json"
    assert memory.device_bytes == forecast(MINI, at_stage(setup, 3)).device_bytes < FITS
    assert remedy_of(MINI, recipe(), Setup(world_size=1)) is not None, "adapters on one GPU"
