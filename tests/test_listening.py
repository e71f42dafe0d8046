"""What opens a port: a training run on one rank on this machine's own address only, several ranks and Ray on all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
WATCHED = """
import json, os, pathlib, socket, sys
import psutil
from dfactory.cli import main
from dfactory.runs.metrics import MetricsLog

def step(log, *words):
    me = psutil.Process()
    planted = socket.create_server(("0.0.0.0", 0))
    sockets = [one for process in (me, *me.children(recursive=True)) for one in process.net_connections("inet")]
    found = [tuple(one.laddr) for one in sockets if not one.raddr]
    pathlib.Path("found.json").write_text(json.dumps([planted.getsockname()[1], found]))

MetricsLog.step = step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_on_one_rank_listens_on_loopback_only(tmp_path):
    """The port that the test opens in it shows that others would be seen; gloo's are beside it."""
    keys = ["max_steps=1", "eval_datasets=[]", "eval_decode_prompts=0", "output_dir=run"]
    keys.append(f"datasets=[{{path: {ROOT}/recipes/quickstart/data/heldout.jsonl}}]")
    kept = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "RANK")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "train", str(ROOT / "recipes/quickstart/sft.yaml"), *keys],
        cwd=tmp_path,
        env=kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (tmp_path / "found.json").is_file(), done.stderr[-3000:]
    planted, found = json.loads((tmp_path / "found.json").read_text())
    assert [port for address, port in found if address != "127.0.0.1"] == [planted]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_single_learner_has_no_meeting_place(world_size, monkeypatch):
    """torch's store would listen on all interfaces, and asks nobody who they are."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'dfactory[rl]'")
    from dfactory.rl.actors import LearnerActor

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("MASTER_ADDR")
    learner = LearnerActor(0, world_size, os.getcwd())
    address = learner.run(
        {},
        lambda recipe, client: os.environ.get("MASTER_ADDR"),
        ("127.0.0.9", 1),
        SimpleNamespace(beat=lambda rank: None),
    )
    assert address == (None if world_size == 1 else "127.0.0.9")
