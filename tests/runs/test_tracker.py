"""Trackers get a run's keys, metrics and tables, several at once, and a resumed run continues theirs; all offline, with
the real tensorboard, trackio and wandb."""

import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from dfactory.config.training import TRACKERS
from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from dfactory.runs.folder import RunFolder
from dfactory.runs.metrics import MetricsLog
from dfactory.runs.trackers import SERVICES, check_trackers
from tests.engine.conftest import environment

METRICS = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1.0}
SECRET = "model_name_or_path=https://me:hunter2hunter2@host/x"
READ_TRACKIO = """
import json, trackio
runs = list(trackio.Api().runs("dfactory"))
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([[run.name, run.config, SQLiteStorage.get_logs("dfactory", run.name)] for run in runs]))
"""


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.fixture
def track(recipe_file, tmp_path, offline):
    """track(step, the step resumed from, *keys): a run of one step, with one evaluation that decodes a prompt."""
    folder = RunFolder(tmp_path / "run")

    def run(step: int, resume_step: int | None, *keys: str) -> RunFolder:
        recipe = load_recipe(recipe_file, [f"output_dir={folder.path}", *keys])
        folder.start(recipe, resume_step)
        with MetricsLog(recipe, folder, 9, step - 1) as log:
            log.step(step, 0.0, METRICS | {"loss": float(step)})
            log.evaluation(step, {"loss": 2.0, "hit_rate": 0.5}, [{"expected": "a|b", "answered": f"c{step}"}])
        return folder

    return run


def test_the_table_has_all_of_accelerates_trackers():
    assert SERVICES.keys() == TRACKERS.keys() == LOGGER_TYPE_TO_CLASS.keys()


def test_tensorboard_shows_every_step_once_after_a_resume(track):
    keys = ["report_to=[tensorboard]", SECRET]
    for step, resumed in ((1, None), (2, 1), (3, 2), (2, 1)):  # the last resume is from an earlier checkpoint
        folder = track(step, resumed, *keys)
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 1.0), (2, 2.0)]
    assert [one.value for one in events.Scalars("eval/loss")] == [2.0, 2.0]
    assert "previews/text_summary" in events.Tags()["tensors"]
    config = next(folder.path.glob("tensorboard/*/hparams.yml")).read_text()
    assert "learning_rate: 0.001" in config
    assert "decode.block_size" in config
    assert "hunter2" not in config


def test_several_at_once_and_trackio_continues_its_run(recipe_file, tmp_path):
    """In processes of their own, because trackio reads TRACKIO_DIR when it is imported."""
    variables = environment() | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from dfactory.recipe import load_recipe\n"
        "from dfactory.runs.folder import RunFolder\n"
        "from dfactory.runs.metrics import MetricsLog\n"
        f"recipe = load_recipe({str(recipe_file)!r}, ['report_to=[trackio,tensorboard]', 'run_name=mine',\n"
        f"    'output_dir={tmp_path}/run', 'tracker_options={{trackio: {{group: g}}}}'])\n"
        "folder = RunFolder(recipe.output_dir)\n"
        "for step in (1, 2):\n"
        "    folder.start(recipe, step - 1 or None)\n"
        "    with MetricsLog(recipe, folder, 9, step - 1) as log:\n"
        f"        log.step(step, 0.0, {METRICS})\n" + READ_TRACKIO
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=variables, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((name, config, logs),) = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert re.fullmatch(r"mine-\w{8}", name)
    assert config["learning_rate"] == 0.001
    assert config["_Group"] == "g"
    assert [row["step"] for row in logs if "loss" in row] == [1, 2]
    assert list((tmp_path / "run/tensorboard").glob("events.*"))


def test_a_resumed_run_keeps_its_id_at_wandb_and_the_config_is_the_recipe(track):
    def runs(*arguments: str | int | None):
        time.sleep(1.0)  # wandb names a folder by the second
        folder = track(*arguments, "report_to=[wandb]", "project=elsewhere").path
        deadline = time.monotonic() + 60
        while not all(_records(folder, "exit")) and time.monotonic() < deadline:
            time.sleep(0.1)  # wandb's own process writes the file; on a busy machine after `finish` returns
        return [found[0] for found in _records(folder, "run")], list(_records(folder, "config"))

    runs(1, None, SECRET)
    found, configs = runs(2, 1, "learning_rate=0.5")
    assert len(found) == 2
    assert {run.project for run in found} == {"elsewhere"}
    assert found[0].run_id == found[1].run_id
    assert re.fullmatch(r"\w{8}", found[0].run_id)
    told = [{item.key: item.value_json for config in one for item in config.update} for one in configs]
    assert [config["learning_rate"] for config in told] == ["0.001", "0.5"]
    assert "hunter2" not in str(configs) + str(found)
    assert "<redacted>" in told[0]["model_name_or_path"]
    renewed, _ = runs(1, None)
    assert renewed[-1].run_id != found[0].run_id


def test_a_missing_package_is_named_before_anything_starts(recipe_file):
    name = "aim"
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=f"report_to {name}: its package is not installed: run `pip install"):
        check_trackers(load_recipe(recipe_file, [f"report_to=[{name}]"]))


@pytest.mark.parametrize(
    "keys, told",
    [
        (["report_to=[comet]"], "report_to comet is not known: take of aim, clearml, comet_ml"),
        (["report_to=[wandb,wandb]"], "names one twice"),
        (["tracker_options={wandb: {mode: offline}}"], "tracker_options.wandb, and report_to does not name it"),
        (["report_to=[wandb]", "tracker_options={wandb: offline}"], "give a mapping of options"),
    ],
)
def test_rules_between_the_keys(recipe_file, keys, told):
    with pytest.raises(ConfigError, match=told):
        load_recipe(recipe_file, keys)


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
