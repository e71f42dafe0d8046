"""The tracker gets the run's keys, and a resumed run goes on under the same id; with the real wandb, offline."""

import re
import struct
import time
from collections.abc import Iterator

import pytest
from wandb.proto import wandb_internal_pb2

from dfactory.recipe import load_recipe
from dfactory.runs.folder import RunFolder
from dfactory.runs.metrics import MetricsLog

METRICS = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1.0}


def _records(folder, name):
    """What wandb has written of each of a folder's runs, in their order."""
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    for file in files:
        records = [wandb_internal_pb2.Record.FromString(data) for data in _unframed(file.read_bytes())]
        yield [getattr(record, name) for record in records if record.HasField(name)]


def _unframed(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, in them parts with a head of checksum, length and kind."""
    position, parts = 7, b""  # wandb's own head
    while position + 7 <= len(log):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        size, kind = struct.unpack_from("<HB", log, position + 4)
        parts += log[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.fixture
def tracked(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = RunFolder(tmp_path / "run")

    def track(step: int, resume_step: int | None, *keys: str):
        recipe = load_recipe(recipe_file, ["report_to=[wandb]", f"output_dir={folder.path}", *keys])
        folder.start(recipe, resume_step)
        time.sleep(1.0)  # wandb names a folder by the second
        with MetricsLog(recipe, folder, 9, step - 1) as log:
            log.step(step, 0.0, METRICS)
        deadline = time.monotonic() + 60
        while not all(_records(folder.path, "exit")) and time.monotonic() < deadline:
            time.sleep(0.1)  # wandb's own process writes the file; on a busy machine after `finish` returns
        return [runs[0] for runs in _records(folder.path, "run")]

    return track


def test_a_resumed_run_keeps_its_id_and_the_config_is_the_recipe(tracked):
    secret = "model_name_or_path=https://me:hunter2hunter2@host/x"
    tracked(1, None, secret)
    runs = tracked(2, 1, "learning_rate=0.5")
    assert len(runs) == 2
    assert runs[0].run_id == runs[1].run_id
    assert re.fullmatch(r"\w{8}", runs[0].run_id)
    configs = [{item.key: item.value_json for item in run.config.update} for run in runs]
    assert [config["learning_rate"] for config in configs] == ["0.001", "0.5"]
    assert "hunter2" not in str(runs)
    assert "<redacted>" in configs[0]["model_name_or_path"]
    renewed = tracked(1, None)[-1]
    assert renewed.run_id != runs[0].run_id
