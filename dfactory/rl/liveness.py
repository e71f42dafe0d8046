"""Detects processes that stopped or hang. Ray reports only a process that ended, or whose node did.

Every learner sends the controller heartbeats from a separate thread: a long step does not delay them, a stopped process
does. The driver asks the controller about them once a second, and so notices a stopped controller too.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from dfactory.errors import RolloutError

BEAT_S = 2.0
TURN_S = 2.0  # the most that one turn of the driver's loop counts for: the driver itself may have been stopped


class Process(NamedTuple):
    node_id: str
    address: str
    pid: int

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.address}"


def this_process() -> Process:
    """The calling Ray process."""
    return Process(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid())


def why(problem: BaseException) -> str:
    """One line on what happened to a process or an object: Ray's message without its guesses. A TimeoutError is a hang."""
    if isinstance(problem, RayActorError) and not problem.actor_init_failed:
        text = str(problem)
        found = dict(re.findall(r"^\t(pid|ip): (\S+)$", text, re.MULTILINE))
        where = f"pid {found['pid']} on {found['ip']}: " if found.keys() == {"pid", "ip"} else ""
        lines = [line.strip() for line in text.splitlines() if not re.match(r"\t\w+: ", line)]
        message = " ".join(lines[1:] or lines)
        return where + re.split(r" Worker exit detail: | Some common causes | There are some potential ", message)[0]
    if isinstance(problem, RayTaskError):
        problem = problem.cause
    if isinstance(problem, ObjectLostError):
        return f"the object {problem.object_ref_hex} was lost ({type(problem).__name__})"
    if isinstance(problem, GetTimeoutError) or (isinstance(problem, TimeoutError) and not str(problem)):
        return "no answer in time"
    return str(problem).strip().splitlines()[-1] if str(problem).strip() else type(problem).__name__


@contextlib.contextmanager
def beating(beat: Callable[[], object]) -> Iterator[None]:
    """Call `beat` every BEAT_S from a thread."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            beat()
            ended.wait(BEAT_S)

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Pulse:
    """The controller's side: the time of each learner's last heartbeat."""

    def __init__(self, num_learners: int):
        self.num_learners = num_learners
        self._last: dict[int, float] = {}

    def beat(self, rank: int) -> None:
        self._last[rank] = time.monotonic()

    def silence(self) -> dict[int, float]:
        """Seconds since the last heartbeat of each learner, or since the first call if it has sent none."""
        now = time.monotonic()
        return {rank: now - self._last.setdefault(rank, now) for rank in range(self.num_learners)}


class Watch:
    """The driver's side. Its loop calls `look` once a turn; `look` never waits."""

    def __init__(self, controller, learners: Mapping[int, Process], limit_s: float):
        self.controller, self.learners, self.limit_s = controller, learners, limit_s
        self._process: Process | None = None  # the controller's; None while it may still be reading its prompts
        self._asked = controller.process.remote()
        self._waited = 0.0
        self._late: set[int] = set()

    def look(self, passed: float, running: set[int]) -> None:
        """Check the heartbeats. `passed`: seconds since the last look; `running`: ranks that have not ended. Raises
        RolloutError that names a silent process."""
        if not ray.wait([self._asked], timeout=0)[0]:
            self._waited += min(passed, TURN_S)
            if self._process is not None and self._waited > self.limit_s:
                raise RolloutError(f"the controller ({self._process}) {_silent(self._waited)}")
            return
        try:
            answer = ray.get(self._asked)
        except RayActorError as problem:
            raise RolloutError(f"the controller was lost: {why(problem)}") from problem
        if self._process is None:
            self._process = answer
        else:
            self._judge(answer, running)
        self._asked, self._waited = self.controller.silence.remote(), 0.0

    @property
    def processes(self) -> list[Process]:
        """The controller's, once it is known."""
        return [self._process] if self._process is not None else []

    def _judge(self, silence: dict[int, float], running: set[int]) -> None:
        """Raise RolloutError for a learner that is late twice in a row. Once is not enough: a controller that was stopped
        for a while answers before it has processed the heartbeats in its queue."""
        late = {rank for rank in running if silence[rank] > self.limit_s}
        if certain := sorted(late & self._late):
            rank = certain[0]
            raise RolloutError(f"learner rank {rank} ({self.learners[rank]}) {_silent(silence[rank])}")
        self._late = late


def _silent(seconds: float) -> str:
    return (
        f"has sent no heartbeat for {seconds:.0f} s: is the process stopped, its machine frozen or out of memory? "
        "heartbeat_timeout_s is the limit"
    )
