"""Joining the process group compiles nothing, so that it waits for no compiler and for no lock that one left behind. Leaving
it waits for the group's threads."""

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


BUSY_TO_THE_END = """
import torch, torch.distributed as dist
from dfactory import distributed
distributed.start()
works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(100)]
distributed.leave_at_exit()
"""


def test_a_rank_ends_in_order_while_a_thread_of_its_group_is_busy(tmp_path):
    """Without leaving, the thread takes Python's lock while the interpreter ends: SIGABRT in every third run or so."""
    script = tmp_path / "ranks.py"
    script.write_text(BUSY_TO_THE_END)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(launcher, env=environment, capture_output=True, timeout=300, text=True)
    assert ended.returncode == 0, ended.stderr
