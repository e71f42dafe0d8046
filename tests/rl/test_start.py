"""What may keep a run of stage rl from starting: each ends early, and says what to do."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from tests.engine.conftest import ROOT

RECIPE = ROOT / "recipes/quickstart/rl.yaml"
CONNECT = """
import os, sys
from dfactory.rl.access import lock_local_cluster
lock_local_cluster()
import ray
from dfactory.rl.cluster import _cluster
with _cluster(2.0):
    one = ray.remote(num_cpus=1)(lambda: 1).remote()
    print("answered", ray.get(one))
"""


def run(*words, timeout=400, **variables):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MASTER_ADDR", "RANK", "RAY_ADDRESS", "RAY_TMPDIR")
    }
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
def test_a_long_tmpdir(tmp_path):
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    done = run("-c", CONNECT, TMPDIR=str(folder))
    assert done.stdout.splitlines()[-1:] == ["answered 1"], done.stdout[-2000:] + done.stderr[-3000:]
    assert "Ray uses /tmp/ray instead" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("listening", [False, True], ids=["nobody listens", "who listens is no Ray"])
def test_a_dead_ray_address(listening, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        keys = ["cluster_timeout_s=3", "model_name_or_path=tiny", f"output_dir={tmp_path}/run"]
        started = time.monotonic()
        done = run("-m", "dfactory.cli", "train", RECIPE, *keys, RAY_ADDRESS=address)
    assert done.returncode == 1
    assert f"RAY_ADDRESS {address} did not answer within cluster_timeout_s 3 s: start Ray's head there" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 100  # most of it imports


@pytest.mark.slow
@pytest.mark.parametrize(
    "reward, columns, message",
    [
        ("exact_match", {"answer": None}, "1: reward exact_match: answer None is neither text nor a number"),
        (
            "exact_match",
            {"answers": 4},
            "1: reward exact_match asks for the column answer, which the row does not have",
        ),
        ("{folder}/reward.py:placed", {}, "takes completions by its place only"),
    ],
)
def test_a_reward_that_cannot_score_the_data(reward, columns, message, tmp_path):
    (tmp_path / "reward.py").write_text("def placed(completions, /): ...\n")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "2 + 2?"} | columns))
    keys = ["model_name_or_path=tiny", f"datasets=[{{path: {tmp_path}/data.jsonl}}]", f"output_dir={tmp_path}/run"]
    done = run("-m", "dfactory.cli", "train", RECIPE, *keys, f"reward_funcs=[{reward.format(folder=tmp_path)}]")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_answer_that_is_a_number(tmp_path):
    """A run whose every answer is a number trains, or says that rewards were equal, not that none were there."""
    lines = "".join(f'{{"prompt": "{n} + 2?", "answer": {n + 2}}}\n' for n in range(4))
    (tmp_path / "data.jsonl").write_text(lines)
    keys = ["model_name_or_path=tiny", f"datasets=[{{path: {tmp_path}/data.jsonl}}]", f"output_dir={tmp_path}/run"]
    keys += [
        "max_steps=1",
        "num_generations=2",
        "prompts_per_step=1",
        "decode.max_new_tokens=8",
        "max_steps_without_signal=1",
    ]
    keys += [
        "reward_funcs=[exact_match]",
        "reward_workers=1",
        "eval_datasets=[]",
        "eval_decode_prompts=0",
        "warmup_steps=0",
    ]
    done = run("-m", "dfactory.cli", "train", RECIPE, *keys)
    assert done.returncode == 1
    assert "in every group all 2 rewards were equal (mean 0.000); reward outcomes {'exact_match/ok': 2}" in done.stderr
