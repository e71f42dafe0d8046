"""A checkpoint whose shards want to run code when a run is resumed from it: they are read as data, so nothing runs."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch

from dfactory.assembly import make_policy
from dfactory.engine.checkpoint import load, save
from dfactory.engine.shards import read_as_data
from dfactory.engine.trainer import Trainer
from dfactory.errors import CheckpointError
from dfactory.models.manifest import hash_problems, read_manifest
from dfactory.recipe import load_recipe
from dfactory.runs.folder import RunFolder
from dfactory.types import TrainState
from tests.engine.test_equality import ZERO
from tests.planted import Evil

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def planted(shard: Path, trace: Path):
    """The shard with one more entry, which is shown to work."""
    whole = shard.read_bytes()
    state = torch.load(shard, weights_only=False)
    torch.save(state | {"client": Evil(trace)}, shard)
    torch.load(shard, weights_only=False)
    trace.rmdir()
    yield
    shard.write_bytes(whole)


@pytest.mark.parametrize("stage", [1, 3])
def test_planted_shards_are_refused_and_not_run(recipe_file, tmp_path, stage):
    recipe = load_recipe(recipe_file, [ZERO[stage], f"output_dir={tmp_path}/run"])
    trainer = Trainer(recipe, make_policy(recipe), 1)
    checkpoint, trace = save(trainer, RunFolder(tmp_path / "run"), TrainState(), None), tmp_path / "executed"
    shards = sorted((checkpoint / "engine/shards").glob("*.pt"))
    assert len(shards) == 2
    for shard in shards:
        with planted(shard, trace), pytest.raises(CheckpointError, match=r"not plain data.*mkdir"):
            load(trainer, checkpoint, universal=False)
        assert not trace.exists()
    with planted(shards[-1], trace), pytest.raises(CheckpointError, match=r"could not convert.*not plain data"):
        load(trainer, checkpoint, universal=True)
    assert not trace.exists()
    assert not (tmp_path / "run/.converted").exists()
    load(trainer, checkpoint, universal=False)


def test_a_checkpoint_that_is_removed_while_it_is_read(recipe_file, tmp_path):
    """By another run, whose folder it is."""
    recipe = load_recipe(recipe_file, [f"output_dir={tmp_path}/run", ZERO[1]])
    trainer = Trainer(recipe, make_policy(recipe), 1)
    checkpoint = save(trainer, RunFolder(tmp_path / "other"), TrainState(), None)
    manifest = read_manifest(checkpoint)
    next((checkpoint / "engine/shards").glob("*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-0 is gone: is another run writing"):
        load(trainer, checkpoint, universal=False)
    (problem,) = hash_problems(checkpoint, manifest)
    assert problem.endswith("optim_states.pt is missing")


def test_the_environment_is_left_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch raises where both are set
    file = tmp_path / "x.pt"
    torch.save(json.JSONDecoder, file)
    before = dict(os.environ)
    with pytest.raises(CheckpointError, match=r"not plain data.*JSONDecoder"), read_as_data(tmp_path):
        torch.load(file, weights_only=False)
    assert dict(os.environ) == before
    torch.load(file, weights_only=False)
