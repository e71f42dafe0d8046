"""ray_submit.sh on a real cluster: a head with its dashboard and a token, one job that trains and one that cannot."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "ray_submit.sh"
RECIPE = REPOSITORY / "recipes" / "quickstart" / "rl.yaml"
REWARD = """
def capitals(prompts, completions, completion_ids, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter < "N" for letter in text) - 0.1 * len(ids) for text, ids in zip(texts, completion_ids)]
"""
BROKEN_LATER = """
from pathlib import Path

imported = Path(__file__).with_name("imported")
if imported.exists():  # the driver has imported it, before it asked for actors; now they do
    raise RuntimeError("broken")
imported.touch()
"""
KEYS = [
    *("model_name_or_path=tiny", "reward_funcs=[reward.py:capitals]", "reward_workers=1", "output_dir=a run"),
    *("num_generations=4", "prompts_per_step=2", "max_steps=1", "warmup_steps=0"),
    *("decode.max_new_tokens=16", "decode.threshold=0.5", "eval_datasets=[]", "eval_decode_prompts=0"),
]


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def wait_for(address: str, head: subprocess.Popen, log: Path) -> None:
    """Until the dashboard answers: with 401, as long as nobody shows it the token."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
        except urllib.error.HTTPError as answer:
            assert answer.code == 401  # noqa: PT017  (an answer, not a failure)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no dashboard at {address}: {log.read_text()}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The variables with which one finds a head, started from another folder, and is let in."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: the path of a socket has at most 107 bytes
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    dashboard, agent, client = free_ports(3)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.2", "--port=0", "--min-worker-port=0", "--max-worker-port=0"),  # see nodes.py
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *("--num-cpus=4", "--object-store-memory=200000000", f"--temp-dir={folder}"),
    ]
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(command, cwd="/", env=environment(**token), stdout=output, stderr=output)
    try:
        wait_for(f"http://127.0.0.1:{dashboard}", head, log)
        yield token | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        _, left = psutil.wait_procs([head, *started], timeout=30)
        for process in left:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def submit(shell: str, *words, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [shell, str(SCRIPT), *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_job_trains_on_the_cluster_in_the_folder_of_its_caller(cluster, tmp_path):
    folder = tmp_path / "the caller's"
    folder.mkdir()
    (folder / "reward.py").write_text(REWARD)
    done = submit("bash", RECIPE, *KEYS, cwd=folder, **cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    # The log was followed: this is the driver's own line. Those of its actors come through Ray, on a busy machine too late.
    assert "a run/report/report.html" in done.stdout, done.stdout
    assert "SUCCEEDED" in done.stderr
    row = json.loads((folder / "a run" / "metrics.jsonl").read_text())
    assert row["step"] == 1
    assert (folder / "a run" / "checkpoint-1" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_signal_to_one_learner_of_a_job_ends_it_with_75(cluster, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    keys = [*KEYS, "max_steps=500", "num_learners=2"]
    command = ["sh", str(SCRIPT), str(RECIPE), *keys]
    with (tmp_path / "log").open("w") as log:
        script = subprocess.Popen(command, cwd=tmp_path, env=environment(**cluster), stdout=log, stderr=log)
    file, deadline = tmp_path / "a run/metrics.jsonl", time.monotonic() + 240
    while not (file.is_file() and file.read_text()) and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    learners = [p for p in psutil.process_iter(["name", "cwd"]) if p.info["cwd"] == str(tmp_path)]
    learners = [process for process in learners if "LearnerActor" in process.info["name"]]
    assert len(learners) == 2, (tmp_path / "log").read_text()[-3000:]
    learners[1].send_signal(signal.SIGUSR1)
    assert script.wait(timeout=120) == 75, (tmp_path / "log").read_text()[-3000:]
    last = json.loads(file.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "a run/LATEST").read_text() == f"checkpoint-{last}\n"


@pytest.mark.slow
def test_a_wrong_key_keeps_its_status(cluster, tmp_path):
    done = submit("sh", RECIPE, "max_stepps=1", cwd=tmp_path, **cluster)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "did you mean max_steps?" in done.stdout
    assert "FAILED" in done.stderr


@pytest.mark.slow
def test_a_run_that_fails_on_the_cluster_fails_the_job(cluster, tmp_path):
    (tmp_path / "reward.py").write_text(BROKEN_LATER + REWARD)
    done = submit("sh", RECIPE, *KEYS, cwd=tmp_path, **cluster)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "RuntimeError: broken" in done.stdout
    assert "FAILED" in done.stderr


@pytest.mark.slow
def test_without_the_token_nothing_is_submitted(cluster, tmp_path):
    done = submit("sh", RECIPE, cwd=tmp_path, RAY_API_SERVER_ADDRESS=cluster["RAY_API_SERVER_ADDRESS"])
    assert done.returncode == 1
    assert "submitted successfully" not in done.stdout


def test_without_a_recipe_it_is_a_usage_error(tmp_path):
    done = submit("sh", cwd=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_an_address_that_is_no_dashboard_is_refused(tmp_path):
    done = submit("sh", RECIPE, cwd=tmp_path, RAY_ADDRESS="auto")
    assert done.returncode == 2
    assert "RAY_API_SERVER_ADDRESS" in done.stderr
