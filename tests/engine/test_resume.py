"""A run that was killed and resumed ends where an undisturbed one ends: bitwise on as many ranks, closely on others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dfactory.cli import main
from tests.engine.conftest import ROOT, read_metrics
from tests.engine.test_equality import ZERO

pytestmark = pytest.mark.slow


def _command(processes: int, recipe: Path, overrides: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(launcher if processes > 1 else []), "-m", "dfactory.cli", "train"]
    return [*start, str(recipe), *overrides]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _start_and_signal(processes: int, recipe: Path, overrides: list[str], run: Path, step: int, number: int) -> int:
    """Start a run, send the signal once metrics.jsonl tells of `step`, and return the exit status."""
    process = subprocess.Popen(
        _command(processes, recipe, overrides),
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, f"no step {step} within 300 s"
        time.sleep(0.02)
    if number == signal.SIGKILL:  # ranks too: they have sessions of their own, and would go on to the last step
        for one in [launched := psutil.Process(process.pid), *launched.children(recursive=True)]:
            one.kill()
    else:
        process.send_signal(number)
    return process.wait(timeout=300)


def _run(processes: int, recipe: Path, overrides: list[str]) -> None:
    done = subprocess.run(
        _command(processes, recipe, overrides),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def _assert_equal_states(one: object, other: object, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{path} differs by {(one - other).abs().max()}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            _assert_equal_states(one[name], other[name], f"{path}/{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            _assert_equal_states(*pair, f"{path}[{index}]")


# 40 documents make about 11 rows, 4 rows a step: checkpoint 4 lies inside the second epoch, and epochs end inside windows.
@pytest.mark.parametrize("processes, stage, accumulation", [(1, 0, 4), (2, 1, 2), (1, 3, 4)])
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(recipe_file, tmp_path, processes, stage, accumulation):
    keys = ["max_steps=10", "save_steps=4", ZERO[stage], f"gradient_accumulation_steps={accumulation}"]
    keys += ["per_device_train_batch_size=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(processes, recipe_file, [*keys, f"output_dir={whole}"])
    _start_and_signal(processes, recipe_file, [*keys, f"output_dir={broken}"], broken, step=6, number=signal.SIGKILL)
    assert (broken / "LATEST").read_text() == "checkpoint-4\n"
    _run(processes, recipe_file, [*keys, f"output_dir={broken}", "resume_from_checkpoint=true"])

    assert read_metrics(broken) == read_metrics(whole)
    assert read_metrics(broken, "step") == read_metrics(whole, "step")  # no step twice, none left out
    last = "checkpoint-10"
    assert (broken / last / "model.safetensors").read_bytes() == (whole / last / "model.safetensors").read_bytes()
    states = [json.loads((run / last / "engine/state.json").read_text()) for run in (broken, whole)]
    assert states[0] == states[1]
    shards = sorted(path.name for path in (whole / last / "engine/shards").glob("*.pt"))
    assert shards
    for name in shards:
        loaded = [torch.load(run / last / "engine/shards" / name, weights_only=False) for run in (broken, whole)]
        _assert_equal_states(*({key: shard.get(key) for key in ("optimizer_state_dict", "module")} for shard in loaded))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resume_on_another_number_of_ranks(recipe_file, tmp_path, stage):
    keys = ["max_steps=8", "save_steps=4", "save_total_limit=1", ZERO[stage], "per_device_train_batch_size=1"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    _run(1, recipe_file, [*keys, f"output_dir={whole}", "gradient_accumulation_steps=4"])
    two = [*keys, f"output_dir={moved}", "gradient_accumulation_steps=2"]
    _start_and_signal(2, recipe_file, two, moved, step=6, number=signal.SIGKILL)
    resumed = [*keys, f"output_dir={moved}", "gradient_accumulation_steps=4", "resume_from_checkpoint=true"]
    _run(1, recipe_file, resumed)
    torch.testing.assert_close(torch.tensor(read_metrics(moved)), torch.tensor(read_metrics(whole)), rtol=0, atol=1e-5)
    assert [path.name for path in moved.glob("checkpoint-*")] == ["checkpoint-8"]  # save_total_limit


def test_sigterm_saves_and_exits_75(recipe_file, tmp_path):
    run = tmp_path / "run"
    status = _start_and_signal(1, recipe_file, [f"output_dir={run}"], run, step=3, number=signal.SIGTERM)
    assert status == 75
    step = int((run / "LATEST").read_text().removeprefix("checkpoint-"))
    assert step == read_metrics(run, "step")[-1] < 20


def test_runs_are_not_mixed(recipe_file, tmp_path, capsys):
    (tmp_path / "checkpoint-7/engine").mkdir(parents=True)
    (tmp_path / "checkpoint-7/engine/state.json").write_text("{}")
    keys = [f"output_dir={tmp_path}", "max_steps=1"]
    assert main(["train", str(recipe_file), *keys]) == 2
    assert "holds checkpoint-7 of an earlier run" in capsys.readouterr().err
    assert main(["train", str(recipe_file), *keys, "overwrite_output_dir=true"]) == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_resume_without_a_whole_checkpoint_is_refused(recipe_file, tmp_path, capsys):
    (tmp_path / "checkpoint-4").mkdir()
    status = main(["train", str(recipe_file), f"output_dir={tmp_path}", "resume_from_checkpoint=true"])
    assert status == 1
    assert "checkpoint-4 is damaged" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()
