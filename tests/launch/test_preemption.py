"""SIGTERM and SIGUSR1, to a launcher, to one rank, to every process: all ranks save at the same step, and 75 comes out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dfactory.engine.torchrun import exit_status

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
RECORDS = REPOSITORY / "recipes/quickstart/data/heldout.jsonl"
KEYS = ["max_steps=5000", "num_train_epochs=500", "eval_datasets=[]", "report_to=[]", "save_steps=5000"]
SRUN = """#!/usr/bin/env bash
# Stands for srun of one node.
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = f"""#!/usr/bin/env bash
if [ "$2" = hostnames ]; then echo first; else echo "   Command={LAUNCH}/slurm.sbatch recipe"; fi
"""


class Run:
    """A launch script with two ranks that would train for long."""

    def __init__(self, folder: Path, script: str, **variables: str):
        self.run, self.log = folder / "run", folder / "log"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        places = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
        command = ["sh", LAUNCH / script, REPOSITORY / "recipes/quickstart/sft.yaml", *KEYS]
        command += [f"datasets=[{{path: {RECORDS}}}]", f"output_dir={self.run}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=os.environ | places | variables, cwd=folder, stdout=log, stderr=log
            )

    def __enter__(self) -> "Run":
        self._wait_for_steps()
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
                process.kill()

    def _wait_for_steps(self) -> None:
        file, deadline = self.run / "metrics.jsonl", time.monotonic() + 240
        while not (file.is_file() and file.stat().st_size):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"no step within 240 s: {self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that train."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return {int(p.environ()["RANK"]): p for p in found if p.environ().get("RANK") and "train" in p.cmdline()}

    def ends_preempted(self) -> None:
        status = self.process.wait(timeout=120)
        assert status == 75, f"{status}: {self.log.read_text()[-3000:]}"
        last = json.loads((self.run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert (self.run / "LATEST").read_text() == f"checkpoint-{last}\n"
        assert len(list((self.run / f"checkpoint-{last}/engine/shards").glob("*.pt"))) >= 1
        assert last < 5000


@pytest.mark.slow
def test_one_rank_under_torchrun_is_enough(tmp_path):
    with Run(tmp_path, "local.sh") as run:
        ranks = run.ranks()
        assert sorted(ranks) == [0, 1]
        ranks[1].send_signal(signal.SIGTERM)
        run.ends_preempted()


@pytest.mark.slow
def test_slurm_signals_every_process_of_a_step(tmp_path):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "1"}
    with Run(tmp_path, "slurm.sbatch", **job) as run:
        agent = next(iter(run.ranks().values())).parent()
        assert "dfactory.engine.torchrun" in agent.cmdline()
        for process in (agent, *run.ranks().values()):
            process.send_signal(signal.SIGUSR1)
        run.ends_preempted()


@pytest.mark.slow
def test_the_launcher_passes_a_signal_on_and_ends_at_once_with_the_second(tmp_path):
    with Run(tmp_path, "local.sh") as run:
        ranks = run.ranks()
        for rank in ranks.values():
            rank.suspend()  # so that it cannot save
        run.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(timeout=30) == 128 + signal.SIGTERM
        psutil.wait_procs(ranks.values(), timeout=30)
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())
    (tmp_path / "again").mkdir()
    shutil.rmtree(tmp_path / "run")
    with Run(tmp_path / "again", "local.sh") as run:
        run.process.send_signal(signal.SIGUSR1)
        run.ends_preempted()


@pytest.mark.parametrize(
    "codes, status", [([75, 75], 75), ([-15, 75], 75), ([1, -15], 1), ([-9, -15], 137), ([-15, -15], 143)]
)
def test_the_status_of_the_ranks_is_that_of_the_launcher(codes, status):
    assert exit_status(codes) == status
