"""A run folder has one run at a time: a second one is refused by name; what a dead one left blocks nobody."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dfactory import distributed
from dfactory.cli import main
from dfactory.errors import CheckpointError, ConfigError
from dfactory.runs import ownership
from dfactory.runs.folder import RunFolder
from dfactory.runs.ownership import LEARNER, RUN, held_by_learner, held_by_run, one_run, this_owner
from tests.engine.conftest import ROOT, environment

HOLD = """
import sys, time
from dfactory.runs import ownership
from dfactory.runs.folder import RunFolder
hold = {"run": ownership.held_by_run, "learner": ownership.held_by_learner}[sys.argv[2]]
with hold(RunFolder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@contextlib.contextmanager
def holder(folder, role: str = "run", seconds: float = 600.0):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(folder), role, str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE_S", 1.0)
    monkeypatch.setattr(ownership, "BEAT_S", 0.1)


def leave(folder, owner, name: str = RUN) -> None:
    """What an owner that was killed has left."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(dataclasses.asdict(owner)))


def test_a_live_owner_is_named_and_a_killed_one_blocks_nobody(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with holder(folder.path) as process:
        started = time.strftime("%Y-%m-%d %H:%M", time.gmtime())[:13]
        name = rf"held by another run: process {process.pid} on {this_owner().host}, started {started}"
        for _ in range(2):
            with pytest.raises(ConfigError, match=name), held_by_run(folder):
                pass
        process.kill()
        process.wait()
        assert (folder.path / RUN).exists()
        began = time.monotonic()
        with held_by_run(folder):
            assert json.loads((folder.path / RUN).read_text())["pid"] == os.getpid()
        assert time.monotonic() - began < 2
    assert not folder.path.joinpath(RUN).exists()


def test_an_owner_that_ends_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path / "a/run")
    with pytest.raises(ZeroDivisionError), held_by_run(folder):
        raise ZeroDivisionError
    assert not folder.path.exists()
    with held_by_run(folder):
        (folder.path / "metrics.jsonl").touch()
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("other", [{"host": "elsewhere", "boot": "another"}, {"boot": "before the machine went down"}])
def test_an_owner_on_another_machine_lives_as_long_as_it_touches_its_file(tmp_path, impatient, other):
    """As on a file system where locks do not reach other machines. Its pid is one of ours, which says nothing."""
    folder, ended = RunFolder(tmp_path / "run"), threading.Event()
    leave(folder.path, dataclasses.replace(this_owner(), **other))

    def touch():
        while not ended.wait(0.1):
            os.utime(folder.path / RUN)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(ConfigError, match=f"held by another run: process {os.getpid()} on"), held_by_run(folder):
        pass
    ended.set()
    thread.join()
    with held_by_run(folder):
        before = (folder.path / RUN).stat().st_mtime_ns
        time.sleep(0.3)
        assert (folder.path / RUN).stat().st_mtime_ns > before


@pytest.mark.parametrize("text", ["", "{}", "[", '{"host": 1}'])
def test_a_file_that_names_nobody_blocks_nobody(tmp_path, impatient, text):
    (tmp_path / RUN).write_text(text)
    with held_by_run(RunFolder(tmp_path)):
        pass


def test_without_locks_pid_and_start_tell(tmp_path, impatient, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    me = this_owner()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    leave(tmp_path, me)
    with pytest.raises(ConfigError, match=f"process {me.pid} on {me.host}"), held_by_run(RunFolder(tmp_path)):
        pass
    for gone in ({"pid": int(ended.stdout)}, {"started": me.started - 60}):  # a pid that was given again
        leave(tmp_path, dataclasses.replace(me, **gone))
        with held_by_run(RunFolder(tmp_path)):
            pass


def test_a_driver_and_its_learner_hold_one_folder_and_a_learner_that_is_left_is_waited_for(tmp_path, impatient):
    folder = RunFolder(tmp_path)
    with held_by_run(folder):
        distributed.start()
        with one_run(folder, driven=True):
            assert {path.name for path in tmp_path.iterdir()} == {RUN, LEARNER}
        with holder(folder.path, "learner") as learner:
            told = f"process {learner.pid} on"
            with pytest.raises(ConfigError, match=told), one_run(folder, driven=True):
                pass
    with holder(folder.path, "learner"), pytest.raises(ConfigError, match=r"process \d+ on"), held_by_run(folder):
        pass
    with holder(folder.path, "learner", seconds=0.3), held_by_run(folder):  # Ray ends it
        pass


@pytest.mark.parametrize("place", ["/proc/dfactory", "/dev/null/run"])
def test_a_folder_that_cannot_be_written(recipe_file, place, capsys):
    for hold in (held_by_run, held_by_learner):
        with pytest.raises(CheckpointError, match=rf"{place} could not be written"), hold(RunFolder(place)):
            pass
    assert main(["train", str(recipe_file), f"output_dir={place}"]) == 1
    assert f"{place} could not be written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_run_before_the_first_checkpoint_is_refused_and_changes_nothing(recipe_file, tmp_path, capsys):
    """New, overwriting, or resuming beside the writer; then the first one is killed, and the next starts at once."""
    run = tmp_path / "run"
    keys = [str(recipe_file), f"output_dir={run}", "eval_datasets=[]", "per_device_train_batch_size=1"]
    command = [sys.executable, "-m", "dfactory.cli", "train", *keys, "max_steps=100000", "save_steps=100000"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        try:
            deadline = time.monotonic() + 300
            while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
                assert first.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            (run / ".checkpoint-7.partial").mkdir()
            for more in ([], ["overwrite_output_dir=true"], ["resume_from_checkpoint=true"]):
                before = (run / "metrics.jsonl").stat().st_size
                assert main(["train", *keys, "max_steps=1", *more]) == 2
                assert f"held by another run: process {first.pid} on" in capsys.readouterr().err
                assert (run / "metrics.jsonl").stat().st_size >= before > 0
            assert (run / ".checkpoint-7.partial").is_dir()
        finally:
            first.send_signal(signal.SIGKILL)
    assert main(["train", *keys, "max_steps=1"]) == 0
    assert not (run / RUN).exists()
