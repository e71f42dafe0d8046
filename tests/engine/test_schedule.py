"""A run whose block size changes: the losses of plain torch with one optimiser throughout, and exact resuming."""

import json

import pytest
import torch

from tests.engine.conftest import read_metrics
from tests.engine.test_equality import plain_losses

SCHEDULE = "block_size_schedule=[[0,1],[2,64],[4,8]]"


@pytest.mark.slow
def test_the_optimiser_goes_on_through_changes_and_a_resumed_run_is_bitwise_the_same(recipe_file, run_jobs, tmp_path):
    """AdamW in plain torch keeps its moments over the changes; so does the engine, or the losses would part at step 3.
    Resumed at a change (checkpoint 2) and in the middle of a phase (checkpoint 3)."""
    keys = [SCHEDULE, "max_steps=6", "save_steps=1", "warmup_steps=0"]
    whole = tmp_path / "whole"
    jobs = [(recipe_file, [*keys, f"output_dir={whole}"])]
    for step in (2, 3):
        start = f"resume_from_checkpoint={whole}/checkpoint-{step}"
        jobs.append((recipe_file, [*keys, f"output_dir={tmp_path / str(step)}", start]))
    run_jobs(1, jobs)

    losses = torch.tensor(read_metrics(whole)[:6])
    torch.testing.assert_close(losses, torch.tensor(plain_losses(recipe_file, keys)), rtol=0, atol=1e-5)
    assert read_metrics(whole, "block_size") == [1, 1, 64, 64, 8, 8]
    for step in (2, 3):
        run = tmp_path / str(step)
        assert read_metrics(run) == read_metrics(whole)[step:]
        last = [folder / "checkpoint-6" for folder in (run, whole)]
        one, other = ((path / "model.safetensors").read_bytes() for path in last)
        assert one == other
        assert len({(path / "engine/state.json").read_text() for path in last}) == 1
    recorded = json.loads((whole / "checkpoint-2/generation_config.json").read_text())
    assert recorded["block_size"] == 8
