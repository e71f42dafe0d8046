"""Runs that are killed, or run out of disk, while they save; and checkpoints that were spoilt afterwards.

The whole sweep is `python -m tests.engine.killpoints`; here are a few of its points, and those that it must not miss.
"""

import json
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dfactory import distributed
from dfactory.engine import checkpoint
from dfactory.engine.shards import absent_shards
from dfactory.errors import CheckpointError
from dfactory.models.manifest import MANIFEST
from dfactory.recipe import load_recipe
from dfactory.runs.folder import STATE, RunFolder, append_text, replace_text, writing
from dfactory.train import train
from tests.engine.conftest import ROOT, environment
from tests.engine.killpoints import FEW

TENSORS = {"a": torch.zeros(1000)}


@pytest.mark.slow
def test_after_a_fault_at_a_few_write_points_a_resumed_run_is_bitwise_the_undisturbed_one():
    command = [sys.executable, "-m", "tests.engine.killpoints", "few"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=580, check=False
    )
    count = sum(map(len, FEW.values()))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert f"{count} faults, {count} runs ended as undisturbed ones, 0 did not" in done.stdout
    assert done.stdout.count("; equal") == count


@pytest.fixture(scope="module")
def finished(recipe_file, tmp_path_factory):
    """A run of three steps with three checkpoints."""
    run = tmp_path_factory.mktemp("finished")
    keys = ["eval_datasets=[]", "max_steps=3", "save_steps=1", "warmup_steps=0", f"output_dir={run}"]
    assert train(load_recipe(recipe_file, keys)) == 0
    return run


def _spoil(path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "truncated" else content[:-1] + b"?")


@pytest.mark.parametrize("how, said", [("missing", "is missing"), ("truncated", "bytes, the"), ("changed", "SHA-256")])
@pytest.mark.parametrize("name", ["model.safetensors", "engine/state.json", "shard"])
def test_a_spoilt_file_is_named_and_the_checkpoint_before_is_taken(finished, how, said, name):
    shard = next((finished / "checkpoint-3/engine/shards").glob("*.pt"))
    file = shard if name == "shard" else finished / "checkpoint-3" / name
    before = file.read_bytes()
    distributed.start()
    try:
        _spoil(file, how)
        found, warnings = checkpoint.find_resume(RunFolder(finished), True, False)
    finally:
        file.write_bytes(before)
    assert found == finished / "checkpoint-2"
    (warning,) = warnings
    assert warning.startswith(f"{finished}/checkpoint-3 is damaged: {file.relative_to(finished / 'checkpoint-3')} ")
    assert said in warning
    assert warning.endswith(f"the run goes on from {finished}/checkpoint-2")


def _entries_without(part: str):
    return lambda text: json.dumps({name: entry for name, entry in json.loads(text).items() if part not in name})


MANIFESTS = {
    "empty": (lambda text: "{}", "the manifest lists no config.json"),
    "a list": (lambda text: "[]", "is not a manifest"),
    "a size that is text": (lambda text: re.sub(r'"size": (\d+)', r'"size": "\1"', text), "not a size and a SHA-256"),
    "a sum that is null": (lambda text: re.sub(r'"sha256": "\w+"', '"sha256": null', text), "not a size and a SHA-256"),
    "a name above": (lambda text: text.replace('"config.json"', '"../config.yaml"'), "is not the name of a file below"),
    "no state": (_entries_without("state.json"), f"the manifest lists no {STATE}"),
    "no shard": (_entries_without("shards/"), "model_states.pt is not in the manifest"),
    "no weights": (_entries_without("safetensors"), "the manifest lists no *.safetensors"),
}


@pytest.mark.parametrize("how", MANIFESTS)
def test_a_manifest_that_is_none_is_a_damage_and_the_checkpoint_before_is_taken(finished, how):
    spoil, said = MANIFESTS[how]
    file = finished / "checkpoint-3" / MANIFEST
    before = file.read_text()
    distributed.start()
    try:
        file.write_text(spoil(before))
        assert file.read_text() != before
        found, (warning,) = checkpoint.find_resume(RunFolder(finished), True, False)
    finally:
        file.write_text(before)
    assert found == finished / "checkpoint-2"
    assert said in warning


@pytest.mark.parametrize("stage, ranks", [(0, 1), (1, 2), (3, 2)])
def test_shards_of_every_rank_have_to_be_there(stage, ranks):
    models = [f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(ranks)]
    names = models if stage == 3 else ["mp_rank_00_model_states.pt"]
    names += [f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(ranks) if stage]
    names = [f"engine/shards/{name}" for name in names]
    assert absent_shards(names, ranks, stage) == []
    for index in range(len(names)):
        (absent,) = absent_shards(names[:index] + names[index + 1 :], ranks, stage)
        assert names[index].endswith(absent)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"world_size": "1", "zero_stage": 0}', "[" * 10**5, '{"step": 1, "source": []}']
)
def test_a_state_that_is_none_is_an_expected_failure(tmp_path, text):
    (tmp_path / "engine").mkdir()
    (tmp_path / STATE).write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.read_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.needs_universal(tmp_path, 0, 1, 1)


def test_nothing_whole_is_an_error_that_names_all(finished):
    files = [finished / f"checkpoint-{step}" / MANIFEST for step in (1, 2, 3)]
    before = {file: file.read_bytes() for file in files}
    distributed.start()
    try:
        for file in files:
            file.unlink()
        with pytest.raises(CheckpointError) as problem:
            checkpoint.find_resume(RunFolder(finished), True, False)
        with pytest.raises(CheckpointError, match="checkpoint-2 is damaged"):
            checkpoint.find_resume(RunFolder(finished), str(finished / "checkpoint-2"), False)
    finally:
        for file, content in before.items():
            file.write_bytes(content)
    assert all(f"checkpoint-{step} holds no {MANIFEST}" in str(problem.value) for step in (1, 2, 3))


def test_a_run_that_goes_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(finished, recipe_file, capsys):
    weights = (finished / "checkpoint-3/model.safetensors").read_bytes()
    keys = ["eval_datasets=[]", "max_steps=3", "save_steps=1", "warmup_steps=0", f"output_dir={finished}"]
    keys += [f"resume_from_checkpoint={finished}/checkpoint-1", "save_total_limit=2"]
    assert train(load_recipe(recipe_file, keys)) == 0
    assert f"{finished}/unused-checkpoint-3 is set aside" in capsys.readouterr().err
    names = ["checkpoint-2", "checkpoint-3", "unused-checkpoint-2", "unused-checkpoint-3"]
    assert sorted(path.name for path in finished.glob("*checkpoint-*")) == names
    assert (finished / "checkpoint-3/model.safetensors").read_bytes() == weights
    assert [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_file_that_the_disk_cuts_short_is_an_error_and_the_old_one_stays(tmp_path):
    """For real: this process may not write files of more than 100 bytes."""
    file = tmp_path / "state.json"
    replace_text(file, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            replace_text(file, "n" * 200)
        with pytest.raises(CheckpointError, match=r"could not be written: .*File too large"):
            append_text(tmp_path / "metrics.jsonl", "n" * 200)
        for save in (lambda path: save_file(TENSORS, path), lambda path: torch.save(TENSORS, path)):
            with pytest.raises(CheckpointError, match="shard could not be written"), writing(tmp_path / "shard"):
                save(tmp_path / "shard")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "old"
