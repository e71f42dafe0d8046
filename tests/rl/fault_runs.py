"""An RL run on the cluster of fault_nodes.py, in a process of its own: started, watched, and struck by faults."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.rl.fault_kinds import Fault
from tests.rl.fault_nodes import HOSTS, Nodes

ROOT = Path(__file__).parents[2]
BOUND_S = 400.0  # for a run, and again from its last fault on
STEPS = 20
KEYS = (
    *("model_name_or_path=tiny", "num_generations=4", "prompts_per_step=2", "decode.max_new_tokens=16"),
    *("decode.threshold=0.5", "eval_datasets=[]", "eval_decode_prompts=0", "warmup_steps=0", "reward_workers=1"),
    *("reward_timeout_s=4", "rollout_timeout_s=30", "heartbeat_timeout_s=15"),
    *(
        "cluster_timeout_s=100",
        "save_steps=2",
        "save_total_limit=2",
        "max_rollout_attempts=6",
        "max_steps_without_signal=6",
    ),
)
SHAPES = (  # of a run; the cluster has three places
    ("num_learners=1", "num_rollout_workers=2"),
    ("num_learners=2", "num_rollout_workers=1"),
)


@dataclass
class Strike:
    fault: Fault
    step: int  # finished steps when it happened
    at: float


class Run:
    """A driver process on the cluster, its folder and what was done to it."""

    def __init__(self, nodes: Nodes, folder: Path, chance: random.Random, shape: tuple[str, str], last_step: int):
        self.nodes, self.folder, self.chance = nodes, folder, chance
        resume = (folder / "run" / "LATEST").is_file()
        shutil.copy(ROOT / "tests/rl/ordered_reward.py", folder / "reward_file.py")
        for order in ("lose", "reward"):
            (folder / order).unlink(missing_ok=True)
        keys = [
            *(f"reward_funcs=[{folder}/reward_file.py:ordered]", f"output_dir={folder}/run", f"max_steps={last_step}"),
            *(f"resume_from_checkpoint={str(resume).lower()}", *shape),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.log = (folder / "log").open("w")
        command = [
            sys.executable,
            str(ROOT / "tests/rl/faulty.py"),
            str(ROOT / "recipes/quickstart/rl.yaml"),
            *KEYS,
            *keys,
        ]
        self.first = len(self.steps()) if resume else 0
        self.started, self.started_at = time.monotonic(), time.time()
        self.driver = subprocess.Popen(
            command, env=environment | {"RAY_ADDRESS": nodes.address}, stdout=self.log, stderr=self.log
        )
        self.strikes: list[Strike] = []

    def steps(self) -> list[dict]:
        file = self.folder / "run" / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_step(self, step: int) -> bool:
        """Whether the run came there, and goes on."""
        while self.driver.poll() is None and time.monotonic() - self._last() < BOUND_S:
            rows = self.steps()
            if self.began and rows and rows[-1]["step"] >= step:
                return True
            time.sleep(0.2)
        return False

    @property
    def began(self) -> bool:
        """Whether the learner has written metrics: those of the run before are no steps of this one. What it says reaches
        the driver's log through Ray, on a busy machine late."""
        file = self.folder / "run" / "metrics.jsonl"
        return file.is_file() and file.stat().st_mtime >= self.started_at

    def strike(self, fault: Fault) -> None:
        time.sleep(self.chance.uniform(0.0, 1.0))
        self.nodes.find("rollout")  # remember what is there, before it is broken
        step = self.steps()[-1]["step"] if self.steps() else 0
        if self.driver.poll() is None and fault.strike(self):
            self.strikes.append(Strike(fault, step, time.monotonic()))

    def wait(self) -> int | None:
        """The exit status; None if it did not end in time."""
        try:
            return self.driver.wait(max(1.0, BOUND_S - (time.monotonic() - self._last())))
        except subprocess.TimeoutExpired:
            self.driver.kill()
            self.driver.wait()
            return None

    def text(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def last_words(self) -> str:
        """The message that it ended with; without one the end of its own output, without that of its actors."""
        _, mark, message = self.text().rpartition("dfactory train: ")
        own = "\n".join(line for line in self.text().splitlines() if "pid=" not in line)
        return message if mark else own[-2000:]

    def _last(self) -> float:
        return self.strikes[-1].at if self.strikes else self.started

    # --- targets -----------------------------------------------------------------------------------------------------

    def one(self, kind: str):
        found = self.nodes.find(kind)
        return self.chance.choice(found)[1] if found else None

    def worker_host(self) -> str | None:
        """A node, not the head, with a rollout actor and no learner."""
        learners = {host for host, _ in self.nodes.find("learner")}
        hosts = sorted({host for host, _ in self.nodes.find("rollout")} - learners - {HOSTS[0]})
        return self.chance.choice(hosts) if hosts else None

    def order(self, file: str, text: str = "") -> bool:
        """Write an order beside the run, and wait until it is taken."""
        path = self.folder / file
        path.with_suffix(".partial").write_text(text)
        path.with_suffix(".partial").rename(path)
        while path.exists() and self.driver.poll() is None and text != "always":
            time.sleep(0.1)
        return text == "always" or not path.exists()


def consumed_wrongly(folder: Path) -> str:
    """What is wrong with the prompts of the steps that were trained; empty if each was met once, in order."""
    run = folder / "run"
    if not (run / "metrics.jsonl").is_file() or not (run / "groups.jsonl").is_file():
        return ""
    lines = [json.loads(line) for line in (run / "groups.jsonl").read_text().splitlines() if line.endswith("}")]
    groups = {line["step"]: line["groups"] for line in lines}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        return f"steps {[row['step'] for row in rows]}"
    met = [number for row in rows for number in groups.get(row["step"], [])]
    told = sum(int(row["groups"]) for row in rows)
    return "" if met == list(range(told)) else f"groups {met}, and the learners tell of {told}"


def left_processes(nodes: Nodes) -> list[str]:
    """Processes of a run that are there 30 s after its end."""
    kinds = ("rollout", "learner", "controller", "reward worker")
    end = time.monotonic() + 30
    while (left := [f"{kind} {process.pid} on {host}" for kind in kinds for host, process in nodes.find(kind)]) and (
        time.monotonic() < end
    ):
        time.sleep(0.5)
    return left
