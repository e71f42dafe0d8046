"""Runs a Python program that nobody has read, for a bounded time, and returns what it answered.

    sandbox = Sandbox(Limits(wall_s=5))
    run = sandbox.call("def add(a, b): return a + b", [Call("add", [2, 3])])
    run.answers[0].equals(5)

The verdict is not the program's to give. It gets arguments and sends answers; the caller, in this process, compares them
with values that never left it. So there is nothing to forge: exit(0), a printed "passed", an object that equals
everything, patched builtins or a program that writes to the answer channel itself can only send a wrong answer. Every
question has a nonce, and a word out of turn ends the run.

Each program has its own process with `python -I -S`, an almost empty environment, a folder of its own, and limits on CPU
time, wall time, memory, processes and threads, files, and output. How far it is cut off beyond that depends on the kernel:

    namespaces    Own user, mount, process, network, IPC namespaces. It sees Python, shared libraries and its folder (in
                  memory), no other file, no other process, no network device; runs as a user that owns nothing, without
                  capabilities. When it ends, the kernel kills all that it started.
    landlock      A kernel rule: files as above and no ptrace; no TCP from Linux 6.7 on, no signals to others from 6.12 on.
                  Process numbers and UDP stay visible; the guard below adds what a hook can. A reaper kills orphans.
    interpreter   Only a hook inside Python forbids sockets, processes, ctypes and foreign files. It stops mistakes and
                  simple cheats. A program written to break CPython passes it.

Without namespaces asyncio, subprocess and their like cannot be imported. `isolation="auto"` takes the strongest that works
here; `Sandbox.isolation` and `Sandbox.weaknesses` report it.

It is no virtual machine. A hole in the kernel is a hole here. Limits are per process: together `processes` x `memory_mb`,
and shared memory that nobody has mapped is not counted. Started as root without namespaces, the program is still root's user
(without its capabilities), and only the hook limits its processes. Nor does it help against a program that has learnt the
tests by heart.
"""

import enum
import functools
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dfactory.errors import ConfigError, RolloutError

LAUNCHER, RUNNER = (Path(__file__).with_name(f"sandbox_{name}.py") for name in ("launcher", "runner"))
START_S = 30.0  # two starts of Python, on a busy machine
STOP_S = 10.0  # for the kernel to end a namespace
CHUNK = 1 << 16


class Isolation(enum.StrEnum):
    """From strong to weak."""

    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"
    INTERPRETER = "interpreter"


class Ending(enum.StrEnum):
    """How a run ended. Only FINISHED says that every question was answered; it does not say rightly."""

    FINISHED = "finished"
    RAISED = "raised"  # the program itself could not be run to its end: an exception, or an exit status
    TIMEOUT = "timeout"
    OUTPUT_LIMIT = "output_limit"
    DIED = "died"  # ended before it answered: exit(), or a limit
    OUT_OF_TURN = "out_of_turn"  # wrote to the answer channel what nobody had asked


@dataclass(frozen=True)
class Limits:
    wall_s: float = 5.0  # from the moment that Python runs
    cpu_s: int = 10  # of one process
    memory_mb: int = 512  # address space of one process
    processes: int = 8  # and threads
    file_mb: int = 16  # of one file, and with namespaces of all files
    open_files: int = 64
    output_bytes: int = 1 << 20  # printed, and answered

    def rlimits(self) -> dict[str, int]:
        return {
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_NPROC": self.processes + 2,  # launcher and init count where they are of the same user
            "RLIMIT_FSIZE": self.file_mb << 20,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Call:
    """One question: a function of the program with arguments (JSON values), or an expression over its names."""

    call: str = ""
    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    expression: str | None = None

    def message(self) -> dict:
        return {k: v for k, v in asdict(self).items() if (k == "expression") == (self.expression is not None)}


@dataclass(frozen=True)
class Answer:
    """What came back: a value as JSON, or the name of an exception."""

    value: Any = None
    error: str | None = None

    def equals(self, expected: Any, tolerance: float = 0.0) -> bool:
        return self.error is None and same(self.value, expected, tolerance)


@dataclass(frozen=True)
class Run:
    ending: Ending
    answers: list[Answer]  # one a question, up to the ending
    output: str  # printed, up to the limit
    seconds: float  # since Python ran
    error: str | None = None  # name of the exception that the program raised on being loaded


class Sandbox:
    """Raises ConfigError if the demanded isolation does not work here, with the reason."""

    def __init__(self, limits: Limits | None = None, isolation: str = "auto"):
        self.limits = limits or Limits()
        found, refusals = strongest_isolation()
        if isolation not in ("auto", *Isolation):
            raise ConfigError(f"isolation {isolation!r}: it must be auto, {', '.join(Isolation)}")
        if isolation in refusals:
            raise ConfigError(f"isolation {isolation} does not work on this machine: {refusals[isolation]}")
        self.isolation = found if isolation == "auto" else Isolation(isolation)
        self.weaknesses = refusals

    def call(self, program: str, calls: Sequence[Call]) -> Run:
        """Load a program as a module and put questions to it, one after another, in one process."""
        answers: list[Answer] = []
        with _Process(self.limits, self.isolation, "call") as process:
            try:
                loaded = process.ask({"program": program})
                if loaded.error:
                    return Run(Ending.RAISED, [], process.output, process.seconds, loaded.error)
                for call in calls:
                    answers.append(process.ask(call.message()))
                ending = Ending.FINISHED
            except _Stopped as stop:
                ending = stop.ending
            return Run(ending, answers, process.output, process.seconds)

    def script(self, program: str, stdin: str = "", wall_s: float | None = None) -> Run:
        """Run a program as __main__ on some standard input; `output` is what it printed. `wall_s` can lower the limit."""
        limits = replace(self.limits, wall_s=min(wall_s or self.limits.wall_s, self.limits.wall_s))
        with _Process(limits, self.isolation, "script") as process:
            try:
                process.tell({"program": program, "stdin": stdin})
                ending = Ending.FINISHED if process.finish() == 0 else Ending.RAISED
            except _Stopped as stop:
                ending = stop.ending
            return Run(ending, [], process.output, process.seconds)


@functools.cache
def strongest_isolation() -> tuple[Isolation, dict[str, str]]:
    """The strongest isolation that runs a program here, and why the stronger ones do not."""
    refusals: dict[str, str] = {}
    for isolation in Isolation:
        try:
            with _Process(Limits(wall_s=START_S), isolation, "call") as process:
                process.ask({"program": ""})
                return isolation, refusals
        except (RolloutError, _Stopped) as problem:
            refusals[isolation.value] = str(problem)
    raise RolloutError(f"the sandbox does not run here at all: {refusals}")


class _Stopped(Exception):
    def __init__(self, ending: Ending):
        super().__init__(ending.value)
        self.ending = ending


class _Process:
    """One program in its sandbox, and the pipes to it. No read or write blocks beyond the deadline."""

    def __init__(self, limits: Limits, isolation: Isolation, mode: str):
        self.limits, self.isolation, self.mode = limits, isolation, mode
        self.deadline = time.monotonic() + START_S
        self._printed, self._replies, self._unsent = bytearray(), bytearray(), b""
        self._open = {"output", "reply"}

    def __enter__(self) -> "_Process":
        self.folder = tempfile.mkdtemp(prefix="dfactory-sandbox-")
        request_read, self._request = os.pipe()
        self._reply, reply_write = os.pipe()
        spec = {
            "isolation": self.isolation,
            "mode": self.mode,
            "folder": self.folder,
            "file_bytes": self.limits.file_mb << 20,
            "limits": self.limits.rlimits(),
            "request_fd": request_read,
            "reply_fd": reply_write,
            "runner": str(RUNNER),
        }
        self._launcher = subprocess.Popen(
            [sys._base_executable, "-I", "-S", str(LAUNCHER), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(request_read, reply_write),
            start_new_session=True,
            cwd="/",
            env={},
        )
        os.close(request_read)
        os.close(reply_write)
        self._selector = selectors.DefaultSelector()
        for file, handler in ((self._launcher.stdout.fileno(), self._read_output), (self._reply, self._read_reply)):
            os.set_blocking(file, False)
            self._selector.register(file, selectors.EVENT_READ, handler)
        os.set_blocking(self._request, False)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._selector.close()
        self._launcher.stdin.close()  # tells the launcher to end it
        try:
            self._launcher.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._launcher.pid, signal.SIGKILL)
            self._launcher.wait()
        self._launcher.stdout.close()
        self._launcher.stderr.close()
        os.close(self._request)
        os.close(self._reply)
        shutil.rmtree(self.folder)

    @property
    def seconds(self) -> float:
        return self.limits.wall_s - (self.deadline - time.monotonic())

    @property
    def output(self) -> str:
        return self._printed.decode(errors="replace")

    def tell(self, message: dict) -> None:
        """Start to send a message; `pump` goes on with it."""
        if not self._unsent:
            self._selector.register(self._request, selectors.EVENT_WRITE, self._write_request)
        self._unsent += json.dumps(message).encode() + b"\n"

    def ask(self, message: dict) -> Answer:
        """Send a question and wait for its answer. Raises _Stopped."""
        nonce = secrets.token_hex(8)
        self.tell(message | {"nonce": nonce})
        reply = self._next_reply()
        if not isinstance(reply, dict) or reply.pop("nonce", None) != nonce or not reply.keys() <= {"value", "error"}:
            raise _Stopped(Ending.OUT_OF_TURN)
        return Answer(reply.get("value"), reply.get("error"))

    def pump(self, done: Callable[[], bool]) -> None:
        """Read and write what the pipes take until something is so. Raises _Stopped."""
        while not done():
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise _Stopped(Ending.TIMEOUT)
            for key, _ in self._selector.select(left):
                key.data()

    def finish(self) -> int:
        """Wait for the program's own end; its exit status. Raises _Stopped."""
        self.pump(lambda: not self._open)
        try:
            return self._launcher.wait(max(self.deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:  # closed its pipes and went on
            raise _Stopped(Ending.TIMEOUT) from None

    def _wait_until_ready(self) -> None:
        """The clock of the program starts when Python runs. Raises RolloutError with what the launcher complains of."""
        try:
            ready = self._next_reply() == {"ready": True}
        except _Stopped:
            ready = False
        if not ready:
            self._launcher.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._launcher.wait(STOP_S)
            os.set_blocking(self._launcher.stderr.fileno(), False)
            reason = (self._launcher.stderr.read() or b"").decode(errors="replace").strip().splitlines()
            raise RolloutError(
                f"the sandbox ({self.isolation}) did not start: {reason[-1] if reason else 'no reason given'}"
            )
        self.deadline = time.monotonic() + self.limits.wall_s

    def _next_reply(self) -> Any:
        self.pump(lambda: b"\n" in self._replies or "reply" not in self._open)
        line, end, rest = self._replies.partition(b"\n")
        if not end:
            raise _Stopped(Ending.DIED)
        if rest:
            raise _Stopped(Ending.OUT_OF_TURN)
        self._replies.clear()
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise _Stopped(Ending.OUT_OF_TURN) from None

    def _read_output(self) -> None:
        self._printed += self._read(self._launcher.stdout.fileno(), "output")
        if len(self._printed) > self.limits.output_bytes:
            raise _Stopped(Ending.OUTPUT_LIMIT)

    def _read_reply(self) -> None:
        self._replies += self._read(self._reply, "reply")
        if len(self._replies) > self.limits.output_bytes:
            raise _Stopped(Ending.OUTPUT_LIMIT)

    def _read(self, file: int, name: str) -> bytes:
        found = os.read(file, CHUNK)
        if not found:
            self._selector.unregister(file)
            self._open.discard(name)
        return found

    def _write_request(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._request, self._unsent[:CHUNK]) :]
        except BrokenPipeError:  # it ended, or closed its end: the reply pipe tells which
            self._unsent = b""
        if not self._unsent:
            self._selector.unregister(self._request)


def same(answer: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Is the answer, as JSON, equal to a plain value? Python's equality, on values only, never on the program's objects.

    Numbers are equal across int, float and bool, floats within a relative and absolute tolerance; tuples are lists; nan
    equals nothing. The work is bounded by the size of `expected`.
    """
    if isinstance(expected, (bool, int, float)):
        number = _number(answer)
        close = tolerance > 0 and isinstance(number, (int, float)) and _close(number, expected, tolerance)
        return number is not None and (number == expected or close)
    if expected is None or isinstance(expected, str):
        return type(answer) is type(expected) and answer == expected
    if isinstance(expected, (list, tuple)):
        if not isinstance(answer, list) or len(answer) != len(expected):
            return False
        return all(same(a, e, tolerance) for a, e in zip(answer, expected, strict=True))
    if isinstance(expected, (set, frozenset)):
        return _same_items(_tagged(answer, "set"), [[item] for item in expected], tolerance, wrap=True)
    if isinstance(expected, dict):
        return _same_items(_tagged(answer, "dict"), [[k, v] for k, v in expected.items()], tolerance)
    if isinstance(expected, bytes):
        return _tagged(answer, "bytes") == expected.hex()
    if isinstance(expected, complex):
        return same(_tagged(answer, "complex"), [expected.real, expected.imag], tolerance)
    raise TypeError(f"an expected value of type {type(expected).__name__} is no plain value: {expected!r}")


def _same_items(answer: Any, expected: list, tolerance: float, wrap: bool = False) -> bool:
    """Items without an order: as many, and each expected one is among them."""
    if not isinstance(answer, list) or len(answer) != len(expected):
        return False
    items = [[item] for item in answer] if wrap else answer
    return all(any(same(item, wanted, tolerance) for item in items) for wanted in expected)


def _number(answer: Any) -> int | float | None:
    if isinstance(answer, (bool, int, float)):
        return answer
    try:
        if isinstance(text := _tagged(answer, "int"), str):
            return int(text, 16)
        if isinstance(text := _tagged(answer, "float"), str):
            return float(text)
    except ValueError:
        return None
    return None


def _close(number: float, expected: float, tolerance: float) -> bool:
    try:
        return math.isclose(number, expected, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an int beyond floats
        return False


def _tagged(answer: Any, kind: str) -> Any:
    """The content of {"kind": content}, else None."""
    return answer[kind] if isinstance(answer, dict) and answer.keys() == {kind} else None
