"""A Ray cluster of three nodes on this machine, and what can be done to its processes."""

import os
import signal
import time
from contextlib import suppress

import psutil
from ray.cluster_utils import Cluster

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")  # 127.0.0.1 is "this machine" to Ray, which replaces it
SETTINGS = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
    "worker_niceness": 0,  # 15 is Ray's: beside other jobs its processes would hardly run
}
TITLES = {  # how the processes of a run are told apart: the beginning of the command line, or a part of it
    "rollout": "ray::RolloutActor",
    "learner": "ray::LearnerActor",
    "controller": "ray::Controller",
    "reward worker": "dfactory.rl.rewards.worker",
    "agent": "RuntimeEnvAgent",
}


class Nodes:
    """Three nodes of one core; a node that was lost is replaced on request. The first one is the head."""

    def __init__(self):
        self.cluster = Cluster(shutdown_at_exit=True)
        self.nodes = {}
        for host in HOSTS:
            self._add(host)

    @property
    def address(self) -> str:
        return self.cluster.address

    @property
    def head(self):
        return self.nodes[HOSTS[0]]

    def repair(self) -> None:
        """Replace the nodes whose raylet does not run, and what is left of them."""
        for host, node in list(self.nodes.items()):
            raylet = self.raylet(host)
            if raylet is None or raylet.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                for process in self.inside(host):
                    _signal(process, signal.SIGKILL)
                with suppress(Exception):  # whatever Ray makes of the corpse
                    self.cluster.remove_node(node, allow_graceful=False)
                self._add(host)

    def head_is_whole(self) -> bool:
        names = ("raylet", "gcs_server")
        found = [_process(self.head.all_processes[name][0].process.pid) for name in names]
        return all(p is not None and p.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE) for p in found)

    def raylet(self, host: str) -> psutil.Process | None:
        return _process(self.nodes[host].all_processes["raylet"][0].process.pid)

    def helper(self, host: str, name: str) -> psutil.Process | None:
        """gcs_server, log_monitor: as Ray calls them."""
        kept = self.nodes[host].all_processes.get(name)
        return _process(kept[0].process.pid) if kept else None

    def inside(self, host: str) -> list[psutil.Process]:
        """The raylet of a node and everything below it, remembered from the last look where the raylet is gone."""
        raylet = self.raylet(host)
        if raylet is not None:
            with suppress(psutil.NoSuchProcess):
                self._below[host] = [raylet, *raylet.children(recursive=True)]
        return [process for process in self._below.get(host, []) if process.is_running()]

    def find(self, kind: str) -> list[tuple[str, psutil.Process]]:
        """(host, process) of the processes of a kind; see TITLES."""
        found = []
        for host in self.nodes:
            for process in self.inside(host):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if TITLES[kind] in " ".join(process.cmdline()):
                        found.append((host, process))
        return found

    def close(self) -> None:
        everything = [process for host in self.nodes for process in self.inside(host)]
        with suppress(Exception):
            self.cluster.shutdown()
        for process in everything:
            _signal(process, signal.SIGKILL)

    def _add(self, host: str) -> None:
        self._below = {**getattr(self, "_below", {}), host: []}
        config = {"_system_config": SETTINGS} if not self.nodes else {}
        self.nodes[host] = self.cluster.add_node(num_cpus=1, node_ip_address=host, include_dashboard=False, **config)


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        os.kill(process.pid, number)


def pause(processes: list[psutil.Process], seconds: float) -> None:
    for process in processes:
        _signal(process, signal.SIGSTOP)
    time.sleep(seconds)
    for process in processes:
        _signal(process, signal.SIGCONT)


def slow_down(processes: list[psutil.Process], seconds: float) -> None:
    """A fifth of the speed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pause(processes, 0.2)
        time.sleep(0.05)


def kill(process: psutil.Process) -> None:
    _signal(process, signal.SIGKILL)


def stop(process: psutil.Process) -> None:
    _signal(process, signal.SIGSTOP)
