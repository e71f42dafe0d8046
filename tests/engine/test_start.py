"""Joining the process group compiles nothing, so that it waits for no compiler and for no lock that one left behind."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
START = "from dfactory import distributed; print(distributed.start())"


def test_a_lock_of_a_killed_compiler_is_not_waited_for(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    told = subprocess.run(
        [sys.executable, "-c", START],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        timeout=300,
        text=True,
        check=True,
    )
    assert told.stdout == "(0, 1)\n"
    assert list(tmp_path.rglob("*")) == [lock.parent, lock]
