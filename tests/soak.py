"""Continuous SFT and RL on the tiny model, watched for growth:

    python -m tests.soak --minutes 120

Samples memory, threads and file handles of every process of the two runs, by kind, and the objects in Ray's store. Prints
the first sample after the warm-up (the first fifth of the time), the last one, and the fitted line's growth between them.
Exit status 1 if that is above its bound for any, or if a run did not end as preempted after its SIGTERM.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import numpy as np
import psutil

from benchmarks.overlap import REWARD  # by chance: one that could be learnt would leave no signal within the hour

ROOT = Path(__file__).parents[1]
FOREVER = 10**8
WARM_UP = 0.2
FEWEST = 10  # samples that a line is fitted to
BOUNDS = {  # growth over the whole time, at most: a part of the first value and a constant
    "memory MB": (0.05, 20.0),
    "threads": (0.0, 3.0),
    "handles": (0.0, 5.0),
    "objects": (0.0, 6.0),
    "store MB": (0.0, 20.0),
}
KINDS = {
    "ray::LearnerActor": "RL learner",
    "ray::RolloutActor": "RL rollout actor",
    "ray::Controller": "RL controller",
    "dfactory.rl.rewards.worker": "RL reward worker",
    "gcs_server": "Ray GCS",
    "raylet/raylet": "Ray raylet",
    "soak-sft": "SFT",
    "tests.soak": "RL driver",
}
SHORT = [
    "model_name_or_path=tiny",
    "eval_datasets=[]",
    "eval_decode_prompts=0",
    f"max_steps={FOREVER}",
    "save_total_limit=1",
]


def start_sft(folder: Path) -> subprocess.Popen:
    keys = [*SHORT, "save_steps=200", "logging_steps=1000", f"output_dir={folder}/soak-sft"]
    command = [sys.executable, "-m", "dfactory.cli", "train", str(ROOT / "recipes/quickstart/sft.yaml"), *keys]
    with (folder / "sft.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def run_rl(folder: Path) -> int:
    """In this process, on a Ray of its own, until a signal comes."""
    import ray

    from dfactory.recipe import load_recipe
    from dfactory.train import train

    (folder / "reward.py").write_text(REWARD)
    keys = [
        *(*SHORT, "save_steps=50", "logging_steps=1000", f"output_dir={folder}/soak-rl", "num_generations=4"),
        *("prompts_per_step=2", "decode.max_new_tokens=16", "decode.threshold=0.5", "reward_workers=1"),
        *(f"reward_funcs=[{folder}/reward.py:chance]", "max_staleness=1", "max_steps_without_signal=1000"),
    ]
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        return train(load_recipe(ROOT / "recipes/quickstart/rl.yaml", keys))
    finally:
        ray.shutdown()


def sample() -> dict[tuple[str, str], float]:
    """(kind of process, what) -> value; processes of a kind are added up."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            line = " ".join(process.cmdline())
            kind = next((name for mark, name in KINDS.items() if mark in line), None)
            if kind is not None:
                found[kind, "memory MB"] += process.memory_full_info().uss / 2**20
                found[kind, "threads"] += process.num_threads()
                found[kind, "handles"] += process.num_fds()
    return found | store()


def store() -> dict[tuple[str, str], float]:
    import ray
    from ray._private import internal_api

    if not ray.is_initialized():
        return {}
    stats = internal_api.get_memory_info_reply(ray._private.state.state).store_stats
    return {
        ("Ray store", "objects"): float(stats.num_local_objects),
        ("Ray store", "store MB"): stats.object_store_bytes_used / 2**20,
    }


def watch(minutes: float, every_s: float, samples: list, sft: subprocess.Popen) -> None:
    """Sample until the time is over, then ask both runs to end."""
    started = time.monotonic()
    while time.monotonic() - started < 60 * minutes and sft.poll() is None:
        time.sleep(every_s)
        samples.append((time.monotonic() - started, sample()))
    sft.send_signal(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def judge(samples: list) -> bool:
    """Print the table; whether all is within its bounds."""
    end = samples[-1][0]
    names = sorted(set.union(*(set(values) for _, values in samples)))
    warm = [(at, values) for at, values in samples if at >= WARM_UP * end and values.keys() >= set(names)]
    if len(warm) < FEWEST:
        print(f"only {len(warm)} samples with all processes there, {FEWEST} are needed: give it more --minutes")
        return False
    good = True
    print(f"{len(warm)} samples from {warm[0][0] / 60:.1f} to {end / 60:.1f} minutes")
    print(f"{'of':<20}{'what':<12}{'first':>10}{'last':>10}{'fitted growth':>16}{'bound':>10}")
    for name in names:
        at, value = np.array([(at, values[name]) for at, values in warm]).T
        growth = np.polyfit(at, value, 1)[0] * (end - warm[0][0])
        share, constant = BOUNDS[name[1]]
        bound = share * value[0] + constant
        good &= growth <= bound
        told = "" if growth <= bound else "  GROWS"
        print(f"{name[0]:<20}{name[1]:<12}{value[0]:>10.1f}{value[-1]:>10.1f}{growth:>16.2f}{bound:>10.1f}{told}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    os.chdir(ROOT)
    sft, samples = start_sft(folder), []
    thread = threading.Thread(target=watch, args=(arguments.minutes, arguments.every, samples, sft), daemon=True)
    thread.start()
    try:
        statuses = {"RL": run_rl(folder), "SFT": sft.wait(timeout=120)}
    finally:
        sft.kill()  # where RL failed it would go on for ever
    thread.join()
    steps = {name: (folder / f"soak-{name}/metrics.jsonl").read_text().count("\n") for name in ("sft", "rl")}
    print(f"exit statuses {statuses} (75: preempted, as asked), steps {steps}, in {folder}")
    return 0 if judge(samples) and set(statuses.values()) == {75} else 1


if __name__ == "__main__":
    sys.exit(main())
