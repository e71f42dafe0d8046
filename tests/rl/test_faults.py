"""A few faults out of tests/rl/faults.py, always the same ones; the command itself draws them at random."""

import subprocess
import sys

import pytest

from tests.rl.test_cluster import ROOT, environment

pytestmark = pytest.mark.slow

PLAN = "SIGKILL rollout; reward: raise reward function; SIGSTOP learner"


def test_a_run_survives_some_faults_and_names_the_last(ray_folder):
    command = [sys.executable, "-m", "tests.rl.faults", "--plan", PLAN]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=590, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "): named after" in done.stdout
    assert done.stdout.splitlines()[-1] == "3 faults"
