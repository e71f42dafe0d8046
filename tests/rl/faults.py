"""Breaks RL runs at random times on a Ray cluster of three nodes, and shows that every one ends by itself:

    python -m tests.rl.faults --runs 20 --seed 0

A run gets several faults that it has to survive, and at last perhaps one that ends it. Ended, it has exited 0, or with a
message that names the culprit, within a bound; every prompt was consumed once, in order; no process of it is left. A run
that was ended is taken up again from its checkpoint by the next one. Prints a table; the exit status is 1 if any promise
was broken.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dfactory.rl.access import lock_local_cluster

lock_local_cluster()  # before Ray is imported

from tests.rl import fault_nodes  # noqa: E402
from tests.rl.fault_nodes import HOSTS, Nodes  # noqa: E402

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
BLAME = {  # what the output of a run that was ended by a fault has to say
    "learner": r"learner rank \d.*(was lost|no sign of life)",
    "controller": r"controller.*(was lost|no sign of life)",
    "head": r"(?i)raylet|gcs|learner rank \d|controller was lost",
    "weights": r"could not take the weights of version \d+ from Ray's store: the object \w+ was lost",
    "reward": r"no group of \d+ had a signal.*poisoned",
    "rollout": r"rollout actor \d",
    "reward worker": r"a process with the rewards ordered (did not start|took longer)",
}


@dataclass
class Fault:
    """One way to break a run. `blame`: a key of BLAME if it ends the run; `strike` says whether it found its target."""

    name: str
    target: str
    strike: Callable[["Run"], bool]
    blame: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.target}"


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
        self.started = time.monotonic()
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
        """Whether the learner has written its first words: metrics of the run before are no steps of this one."""
        return "steps from step" in self.text()

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


def process_fault(name: str, kind: str, act: Callable, blame: str | None = None) -> Fault:
    def strike(run: Run) -> bool:
        process = run.one(kind)
        if process is not None:
            act(process)
        return process is not None

    return Fault(name, kind, strike, blame)


def node_fault(name: str, act: Callable, target: str = "node of a rollout") -> Fault:
    """`act` gets the nodes and the host; the node is replaced after a while."""

    def strike(run: Run) -> bool:
        host = run.worker_host()
        if host is not None:
            act(run.nodes, host)
            if name in ("SIGKILL", "SIGSTOP"):
                time.sleep(run.chance.uniform(0, 15))
                run.nodes.repair()
        return host is not None

    return Fault(name, target, strike)


def head_fault(
    name: str, target: str, find: Callable[[Nodes], object], act: Callable, blame: str | None = None
) -> Fault:
    def strike(run: Run) -> bool:
        act(find(run.nodes))
        return True

    return Fault(name, target, strike, blame)


def reward_fault(how: str, blame: str | None = None) -> Fault:
    return Fault(f"reward: {how}", "reward function", lambda run: run.order("reward", how), blame)


def driver_fault(name: str, act: Callable, blame: str | None = None) -> Fault:
    def strike(run: Run) -> bool:
        act(fault_nodes.psutil.Process(run.driver.pid))
        return True

    return Fault(name, "driver", strike, blame)


def for_a_while(process) -> None:
    fault_nodes.pause([process], 4.0)


def agent_of(nodes: Nodes, host: str):
    """Ray's helper on a node; the raylet ends with it."""
    return next(process for place, process in nodes.find("agent") if place == host)


def node_of_the_learner(nodes: Nodes):
    return nodes.raylet(nodes.find("learner")[0][0])


SURVIVED = [
    *[process_fault("SIGKILL", kind, fault_nodes.kill) for kind in ("rollout", "rollout", "reward worker")],
    *[process_fault("SIGSTOP", kind, fault_nodes.stop) for kind in ("rollout", "reward worker")],
    *[
        process_fault("SIGSTOP, SIGCONT", kind, for_a_while)
        for kind in ("rollout", "learner", "controller", "reward worker")
    ],
    *[reward_fault(how) for how in ("hang", "raise", "die", "stop", "nan")],
    node_fault("SIGKILL", lambda nodes, host: fault_nodes.kill(nodes.raylet(host))),
    node_fault("SIGSTOP", lambda nodes, host: fault_nodes.stop(nodes.raylet(host))),
    node_fault("SIGSTOP, SIGCONT", lambda nodes, host: for_a_while(nodes.raylet(host)), "raylet of a rollout"),
    node_fault("slow", lambda nodes, host: fault_nodes.slow_down(nodes.inside(host), 6.0)),
    node_fault("SIGKILL", lambda nodes, host: fault_nodes.kill(agent_of(nodes, host)), "agent of a rollout's node"),
    head_fault("SIGKILL", "log monitor", lambda nodes: nodes.helper(HOSTS[1], "log_monitor"), fault_nodes.kill),
    head_fault("SIGSTOP, SIGCONT", "GCS", lambda nodes: nodes.helper(HOSTS[0], "gcs_server"), for_a_while),
    head_fault(
        "slow", "head node", lambda nodes: nodes.inside(HOSTS[0]), lambda found: fault_nodes.slow_down(found, 6.0)
    ),
    driver_fault("SIGSTOP, SIGCONT", for_a_while),
]
FATAL = [
    process_fault("SIGKILL", "learner", fault_nodes.kill, "learner"),
    process_fault("SIGSTOP", "learner", fault_nodes.stop, "learner"),
    process_fault("SIGKILL", "controller", fault_nodes.kill, "controller"),
    process_fault("SIGSTOP", "controller", fault_nodes.stop, "controller"),
    Fault("object lost", "weights", lambda run: run.order("lose"), "weights"),
    reward_fault("always", "reward"),
    driver_fault("SIGKILL", fault_nodes.kill, "driver"),
    head_fault("SIGKILL", "node of the learner", node_of_the_learner, fault_nodes.kill, "head"),
    head_fault("SIGKILL", "head node", lambda nodes: nodes.raylet(HOSTS[0]), fault_nodes.kill, "head"),
    head_fault("SIGKILL", "GCS", lambda nodes: nodes.helper(HOSTS[0], "gcs_server"), fault_nodes.kill, "head"),
]


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


def judge(run: Run, status: int | None) -> tuple[str, str]:
    """(outcome, complaint) of an ended run."""
    if status is None:
        return "hung", f"did not end within {BOUND_S:.0f} s"
    if wrong := consumed_wrongly(run.folder):
        return "prompts wrong", wrong
    if left := left_processes(run.nodes):
        return "processes left", ", ".join(left)
    if status == 0:
        return "finished", ""
    blames = {strike.fault.blame for strike in run.strikes} | {"rollout", "reward worker"}
    if status == -signal.SIGKILL and "driver" in blames:
        return "named", ""
    named = any(re.search(BLAME[blame], run.text(), re.DOTALL) for blame in blames & BLAME.keys())
    return ("named", "") if named else ("no culprit", run.text()[-1500:])


def left_processes(nodes: Nodes) -> list[str]:
    """Processes of a run that are there 30 s after its end."""
    kinds = ("rollout", "learner", "controller", "reward worker")
    end = time.monotonic() + 30
    while (left := [f"{kind} {process.pid} on {host}" for kind in kinds for host, process in nodes.find(kind)]) and (
        time.monotonic() < end
    ):
        time.sleep(0.5)
    return left


def break_one(run: Run, faults: list[Fault], last_step: int) -> tuple[str, str]:
    """Let the faults strike at random steps, and wait for the end: (outcome, complaint)."""
    steps = range(last_step - STEPS, last_step - 4)
    for fault, step in zip(faults, sorted(run.chance.choices(steps, k=len(faults))), strict=True):
        if not run.wait_for_step(step):
            break
        run.strike(fault)
    return judge(run, run.wait())


def tally(table: Counter, run: Run, outcome: str) -> None:
    """Count each fault under what became of the run: a fault after which steps were finished was survived."""
    last = run.steps()[-1]["step"] if run.steps() else 0
    for strike in run.strikes:
        ending = strike is run.strikes[-1]
        survived = outcome in ("finished", "named") and (not ending or outcome == "finished") and last >= strike.step
        table[str(strike.fault.name), strike.fault.target, "survived" if survived else outcome] += 1


def print_table(table: Counter) -> None:
    outcomes = ["survived", "named", "hung", "prompts wrong", "processes left", "no culprit"]
    print(f"\n{'fault':<18}{'target':<22}" + "".join(f"{name:>16}" for name in outcomes))
    for name, target in sorted({key[:2] for key in table}):
        print(f"{name:<18}{target:<22}" + "".join(f"{table[name, target, outcome]:>16}" for outcome in outcomes))
    totals = [sum(count for key, count in table.items() if key[2] == outcome) for outcome in outcomes]
    print(f"{'all':<40}" + "".join(f"{total:>16}" for total in totals) + f"\n{sum(totals)} faults")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=5, help="of a run, to be survived")
    parser.add_argument("--only", default="", help="faults whose name and target hold this text")
    parser.add_argument("--plan", help="names as in the table, with semicolons between: what every run gets")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so long")
    arguments = parser.parse_args()
    chance, table, broken = random.Random(arguments.seed), Counter(), []
    base = Path(tempfile.mkdtemp(prefix="faults"))
    survived = [fault for fault in SURVIVED if arguments.only in str(fault)]
    fatal = [fault for fault in FATAL if arguments.only in str(fault)]
    nodes, folder, last_step, shape, started = None, base / "0", STEPS, SHAPES[0], time.monotonic()
    chance.shuffle(fatal)
    for number in range(arguments.runs):
        if time.monotonic() - started > 60 * arguments.minutes:
            break
        if nodes is None or not nodes.head_is_whole():
            if nodes is not None:
                nodes.close()
            nodes = Nodes()
        nodes.repair()
        if arguments.plan:
            known = {str(fault): fault for fault in (*SURVIVED, *FATAL)}
            faults = [known[name.strip()] for name in arguments.plan.split(";")]
        else:
            faults = chance.choices(survived, k=arguments.faults) if survived else []
            if fatal and (not faults or chance.random() < 0.6):
                faults.append(fatal[number % len(fatal)])
        folder.mkdir(exist_ok=True)
        before = time.monotonic()
        run = Run(nodes, folder, chance, shape, last_step)
        outcome, complaint = break_one(run, faults, last_step)
        tally(table, run, outcome)
        done = ", ".join(str(strike.fault) for strike in run.strikes)
        print(
            f"run {number} ({' '.join(shape)}): {outcome} after {time.monotonic() - before:.0f} s: {done}", flush=True
        )
        if complaint:
            broken.append(number)
            print(f"    {complaint}\n    in {folder}", flush=True)
        if outcome == "named" and (folder / "run" / "LATEST").is_file():  # the next run goes on
            last_step = int((folder / "run" / "LATEST").read_text().strip().rpartition("-")[2]) + STEPS
        else:
            folder, last_step = base / str(number + 1), STEPS
            shape = SHAPES[chance.random() < 0.25]
    if nodes is not None:
        nodes.close()
    print_table(table)
    if not broken:
        shutil.rmtree(base)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
