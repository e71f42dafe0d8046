"""Whole runs of stage rl on a local Ray cluster: learners, rollout actor, controller and rewards in their processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dfactory.engine.checkpoint import read_state
from tests.engine.conftest import ROOT
from tests.rl.models import write_model

pytestmark = pytest.mark.slow

RECIPE = ROOT / "recipes/quickstart/rl.yaml"
REWARD = """
def capitals(prompts, completions, completion_ids, **columns):
    '''Short is good, and a letter of the first half of the alphabet: most groups have a signal.'''
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter < "N" for letter in text) - 0.1 * len(ids) for text, ids in zip(texts, completion_ids)]
"""
SABOTEUR = """
def saboteur(prompts, completions, completion_ids, **columns):
    # Its first call kills the rollout actor, the next ones raise, hang, and lose a reward.
    import os, pathlib, time, psutil

    canary = os.environ["CANARY"]
    call = len(list(pathlib.Path(canary).glob("call-*")))
    (pathlib.Path(canary) / f"call-{call}").touch()
    if call == 0:
        for process in psutil.process_iter(["name"]):
            if "RolloutActor" in process.info["name"] and process.environ().get("CANARY") == canary:
                process.kill()
    if call == 1:
        raise ValueError("poisoned")
    if call == 2:
        time.sleep(600)
    rewards = capitals(prompts, completions, completion_ids)
    return rewards[:1] if call == 3 else rewards
"""
STRANGER = "import sys, ray; ray.init(address=sys.argv[1], logging_level='error')"
LOCKED = f"""
import subprocess, sys, os
from dfactory.rl.access import lock_local_cluster
lock_local_cluster()
import ray
ray.init(num_cpus=1, include_dashboard=False, logging_level="error")
address = ray.get_runtime_context().gcs_address
stranger = {{name: value for name, value in os.environ.items() if not name.startswith("RAY_")}}
for environment in (dict(os.environ), stranger):
    done = subprocess.run([sys.executable, "-c", {STRANGER!r}, address], env=environment, capture_output=True, timeout=120)
    print("status", done.returncode)
"""


def environment(**more: str) -> dict[str, str]:
    variables = os.environ | more | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for name in ("MASTER_ADDR", "RANK", "RAY_ADDRESS"):
        variables.pop(name, None)
    return variables


def run(*words, timeout: int = 300, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(**variables), timeout=timeout, check=False
    )


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    reward = tmp_path_factory.mktemp("reward") / "reward.py"
    reward.write_text(REWARD)
    return [
        "model_name_or_path=tiny",
        f"reward_funcs=[{reward}:capitals]",
        "num_generations=4",
        "prompts_per_step=2",
        "decode.max_new_tokens=16",
        "decode.threshold=0.5",
        "eval_datasets=[]",
        "eval_decode_prompts=0",
        "warmup_steps=0",
        "reward_workers=1",
    ]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> dict[str, Path]:
    """Short runs of every policy loss; "resumed" is "whole" stopped after two steps and taken up again; "canvas" has full
    attention; "faulty" loses its rollout actor and some rewards."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "reward.py").write_text(REWARD + SABOTEUR)
    options = {
        "whole": ["max_steps=3"],
        "resumed": ["max_steps=2"],
        "sampled": ["max_steps=2", "trace_steps=1", "kl_coef=0.1", "kl_estimator=k2", "num_iterations=2"],
        "ebpo": [
            *("max_steps=2", "policy_loss=ebpo", "num_views=2", "mask_count=exact", "noise_range_low=0"),
            *("noise_range_high=1", "row_length=320", "ratio_clip=unconditional", "max_staleness=1"),
        ],
        "diffu_grpo": [
            *("max_steps=2", "policy_loss=diffu_grpo", "loss_aggregation=dr_grpo", "use_peft=true", "kl_coef=0.1"),
            *("zero_signal=drop", "num_learners=2", f"deepspeed={ROOT}/recipes/deepspeed/zero3.json"),
        ],
        "canvas": [
            *(*write_model(folder / "full", "Dream"), "block_size=null", "row_length=null", "decode.block_size=8"),
            *("max_steps=2", "trace_steps=2", "trace_stride=2", "max_staleness=1"),
        ],
        "faulty": ["max_steps=3", f"reward_funcs=[{folder}/reward.py:saboteur]", "reward_timeout_s=10"],
    }
    jobs = [
        {"recipe": str(RECIPE), "overrides": [*base, f"output_dir={folder / name}", *keys]}
        for name, keys in options.items()
    ]
    again = [*base, f"output_dir={folder / 'resumed'}", "max_steps=3", "resume_from_checkpoint=true"]
    jobs.append({"recipe": str(RECIPE), "overrides": again})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run(ROOT / "tests/rl/worker.py", folder / "jobs.json", timeout=590, CANARY=str(folder))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return {name: folder / name for name in options}


def test_the_ratio_is_one_at_the_first_step_on_new_rollouts(runs):
    for name, folder in runs.items():
        first = metrics(folder)[0]
        assert first["ratio_spread"] < 1e-5, f"{name}: {first['ratio_spread']}"
        assert first["grad_norm"] > 0, name
        # what the decoder recorded is what a learner computes; suppressed tokens are the rest
        assert first["decoder_gap"] < 0.01, name
    second = metrics(runs["sampled"])[1]  # of the same rollouts
    assert second["ratio_spread"] > 0


def test_a_resumed_run_is_bitwise_the_same(runs):
    whole, resumed = (metrics(runs[name])[-1] for name in ("whole", "resumed"))
    for name in ("loss", "reward", "grad_norm", "tokens", "step", "epoch"):
        assert whole[name] == resumed[name], name
    one, other = (load_file(runs[name] / "checkpoint-3" / "model.safetensors") for name in ("whole", "resumed"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_what_a_run_leaves(runs):
    rows = metrics(runs["whole"])
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["staleness"] == 0 and row["sync_bytes"] > 4_000_000 for row in rows)
    lines = (runs["whole"] / "completions.jsonl").read_text().splitlines()
    assert {"prompt", "completion", "reward", "advantage", "version"} <= json.loads(lines[0]).keys()
    adapters = metrics(runs["diffu_grpo"])[0]["sync_bytes"]
    assert 0 < adapters < 1_000_000  # LoRA sends its adapters only


def test_a_run_survives_a_killed_rollout_actor_and_poisoned_rewards(runs):
    rows = metrics(runs["faulty"])
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["rollout_restarts"] >= 1
    unscored = sum(row["unscored"] * row["groups"] for row in rows)
    assert unscored == pytest.approx(3)  # one group raised, one hung, one lost a reward
    state = read_state(runs["faulty"] / "checkpoint-3")
    assert state.source["next_group"] == sum(row["groups"] for row in rows)  # each prompt once


def test_learners_on_two_nodes_meet(base, ray_folder, tmp_path):
    """Three nodes of one core hold two learners and a rollout actor: one each."""
    keys = ["max_steps=1", "num_learners=2", f"output_dir={tmp_path}/run"]
    done = run(ROOT / "tests/rl/nodes.py", RECIPE, tmp_path, *base, *keys)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["learner"] != second["learner"]
    assert first["ranks"] == second["ranks"] == 2
    assert first["controller"] == first["driver"]
    assert metrics(tmp_path / "run")[0]["grad_norm"] > 0


def test_a_demand_that_the_cluster_cannot_meet_lists_demand_and_supply(base, ray_folder, tmp_path):
    """Also a local cluster is started, although another one was left on this machine."""
    (ray_folder / "ray").mkdir()
    (ray_folder / "ray" / "ray_current_cluster").write_text("127.0.0.2:1")
    keys = ["max_steps=1", "num_learners=500", "cluster_timeout_s=5", f"output_dir={tmp_path}"]
    done = run("-m", "dfactory.cli", "train", RECIPE, *base, *keys)
    assert done.returncode == 1
    assert "num_learners 500" in done.stderr
    assert "'CPU': 501.0" in done.stderr


def test_a_lost_learner_and_a_lost_controller_end_the_run_which_resumes_bitwise(base, runs, tmp_path):
    """The learner is killed behind its first checkpoint, the controller in the middle of its table of completions."""
    keys = [*base, "max_steps=3", "save_steps=1", f"output_dir={tmp_path}/run"]
    done = run("-m", "dfactory.cli", "train", RECIPE, *keys, DFACTORY_FAULT="LATEST.renamed:1")
    assert done.returncode == 1
    assert re.search(r"learner rank 0 \(pid \d+ on [\d.]+\) was lost: ", done.stderr)
    assert f"the last checkpoint is {tmp_path}/run/checkpoint-1" in done.stderr
    keys += ["resume_from_checkpoint=true"]
    done = run("-m", "dfactory.cli", "train", RECIPE, *keys, DFACTORY_FAULT="completions.jsonl.appended:1:half")
    assert done.returncode == 1
    assert "the controller was lost" in done.stderr
    done = run("-m", "dfactory.cli", "train", RECIPE, *keys)
    assert done.returncode == 0, done.stderr[-3000:]

    whole, resumed = (folder / "checkpoint-3/model.safetensors" for folder in (runs["whole"], tmp_path / "run"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    tables = [
        [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
        for folder in (runs["whole"], tmp_path / "run")
    ]
    assert tables[0] == tables[1]  # no rollout twice, none left out


def test_a_terminated_run_saves_and_says_preempted(base, tmp_path):
    """In the precision that is faster here, which the driver settles for all processes."""
    keys = ["max_steps=500", "dtype=auto", f"output_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "dfactory.cli", "train", RECIPE, *base, *keys]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    file, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (file.is_file() and file.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, (tmp_path / "log").read_text()[-3000:]
    told = re.search(r"dtype (\w+): this CPU multiplies matrices", (tmp_path / "log").read_text())
    assert f"dtype: {told[1]}\n" in (tmp_path / "run" / "config.yaml").read_text()
    last = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "LATEST").read_text().strip() == f"checkpoint-{last}"


def test_a_stranger_cannot_connect_to_the_local_cluster():
    done = run("-c", LOCKED)
    assert done.stdout.splitlines() == ["status 0", "status 1"], done.stderr[-2000:]
