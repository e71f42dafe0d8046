"""The faults that tests/rl/faults.py draws from, and what a run that was ended by one has to say."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from tests.rl import fault_nodes
from tests.rl.fault_nodes import HOSTS, Nodes

BLAME = {  # what the output of a run that was ended by a fault has to say
    "learner": r"^learner rank \d \(pid \d+ on [\d.]+\) (was lost|has sent no heartbeat)",
    "learner's node": r"^learner rank \d \(pid \d+ on [\d.]+\) was lost|raylet of the driver's node",
    "controller": r"the controller (was lost|\(pid \d+ on [\d.]+\) has sent no heartbeat)",
    "head": r"raylet|GCS|gcs",
    "weights": r"could not read the weights of version \d+ from Ray's store: the object \w+ was lost",
    "reward": r"none of \d+ groups had a signal.*poisoned",
    "rollout": r"rollout actor \d",
    "reward worker": r"a process with the rewards ordered (did not start|took longer)",
}


@dataclass
class Fault:
    """One way to break a run. `blame`: a key of BLAME if it ends the run; `strike` says whether it found its target."""

    name: str
    target: str
    strike: Callable[[Any], bool]
    blame: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.target}"


def process_fault(name: str, kind: str, act: Callable, blame: str | None = None) -> Fault:
    def strike(run) -> bool:
        process = run.one(kind)
        if process is not None:
            act(process)
        return process is not None

    return Fault(name, kind, strike, blame)


def node_fault(name: str, act: Callable, target: str = "node of a rollout") -> Fault:
    """`act` gets the nodes and the host; the node is replaced after a while."""

    def strike(run) -> bool:
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
    def strike(run) -> bool:
        found = find(run.nodes)
        if found is not None:
            act(found)
        return found is not None

    return Fault(name, target, strike, blame)


def reward_fault(how: str, blame: str | None = None) -> Fault:
    return Fault(f"reward: {how}", "reward function", lambda run: run.order("reward", how), blame)


def driver_fault(name: str, act: Callable, blame: str | None = None) -> Fault:
    def strike(run) -> bool:
        act(psutil.Process(run.driver.pid))
        return True

    return Fault(name, "driver", strike, blame)


def for_a_while(process) -> None:
    fault_nodes.pause([process], 4.0)


def agent_of(nodes: Nodes, host: str):
    """Ray's helper on a node; the raylet ends with it."""
    return next(process for place, process in nodes.find("agent") if place == host)


def node_of_the_learner(nodes: Nodes):
    found = nodes.find("learner")
    return nodes.raylet(found[0][0]) if found else None


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
    head_fault("SIGKILL", "node of the learner", node_of_the_learner, fault_nodes.kill, "learner's node"),
    head_fault("SIGKILL", "head node", lambda nodes: nodes.raylet(HOSTS[0]), fault_nodes.kill, "head"),
    head_fault("SIGKILL", "GCS", lambda nodes: nodes.helper(HOSTS[0], "gcs_server"), fault_nodes.kill, "head"),
]
