"""Runs an untrusted Python program for a bounded time, and returns its answers.

    sandbox = Sandbox(Limits(wall_s=5))
    run = sandbox.call("def add(a, b): return a + b", [Call("add", [2, 3])])
    run.answers[0].equals(5)

The verdict is not the program's to give. It gets arguments and sends answers; the caller, in this process, compares them
with values that never left it. So there is nothing to forge: exit(0), a printed "passed", an object that equals
everything, patched builtins or a program that writes to the answer channel itself can only send a wrong answer. Every
question has a nonce, and a word out of turn ends the run.

Each program has its own process with `python -I -S`, an almost empty environment, a folder of its own, and limits on CPU
time, wall time, memory, processes and threads, files, and output. The wall around it is the kernel's: namespaces, and a
seccomp filter that libseccomp compiles (filter.py). How much of that there is depends on the machine:

    bubblewrap    Own user, mount, process, network, IPC namespaces, made by bwrap. It sees Python, shared libraries and its
                  folder (in memory), no other file, no other process, no network device; it runs as a user that owns
                  nothing, without capabilities. When it ends, the kernel kills all that it started. A filter of system
                  calls: no socket of any family, no keys, no mounts. Root becomes nobody first.
    namespaces    The same, set up by launcher.py, where bwrap is not installed or may not run.
    landlock      A kernel rule for files as above, and a narrower filter: threads but no processes, no signals, no socket,
                  no change of any file's mode, owner or times. It can ask whether a path exists that it can name.
    interpreter   No wall. Only a hook inside Python forbids foreign files, and whoever means it gets past that. Never taken
                  unless asked for by this name.

`isolation="auto"` takes the first of the walls that works here; `Sandbox.isolation` and `Sandbox.weaknesses` report it.

What a program leaves is part of its verdict: where a process could not be ended, the folder was taken away or cannot be
removed, or /dev/null has another mode or owner, the run is LEFT_BEHIND and has no answers. Keys and sockets need no look:
the filter lets no program make any.

It is no virtual machine. A hole in the kernel is a hole here. Limits are per process: together `processes` x `memory_mb`,
and shared memory that nobody has mapped is not counted. Without root, bwrap bounds the bytes of the folder, not the number
of empty files. Nor does it help against a program that has learnt the tests by heart.
"""

import enum
import functools
import json
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
from dfactory.rl.sandbox.answers import Answer
from dfactory.rl.sandbox.filter import filter_text

LAUNCHER, RUNNER = (Path(__file__).with_name(f"{name}.py") for name in ("launcher", "runner"))
START_S = 30.0  # two starts of Python, on a busy machine
STOP_S = 10.0  # for the kernel to end a namespace
CHUNK = 1 << 16


class Isolation(enum.StrEnum):
    """From strong to weak."""

    BUBBLEWRAP = "bubblewrap"
    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"
    INTERPRETER = "interpreter"


WALLS = tuple(one for one in Isolation if one is not Isolation.INTERPRETER)


class Ending(enum.StrEnum):
    """How a run ended. Only FINISHED says that every question was answered; it does not say rightly."""

    FINISHED = "finished"
    RAISED = "raised"  # the program itself could not be run to its end: an exception, or an exit status
    TIMEOUT = "timeout"
    OUTPUT_LIMIT = "output_limit"
    DIED = "died"  # ended before it answered: exit(), or a limit
    OUT_OF_TURN = "out_of_turn"  # wrote to the answer channel without a request
    LEFT_BEHIND = "left_behind"  # left something outside its folder, or removed the folder


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
class Run:
    ending: Ending
    answers: list[Answer]  # one a question, up to the ending
    output: str  # printed, up to the limit
    seconds: float  # since Python ran
    error: str | None = None  # name of the exception that the program raised on being loaded


class Sandbox:
    """Raises ConfigError if the demanded isolation does not work here, or no wall does, with the reasons."""

    def __init__(self, limits: Limits | None = None, isolation: str = "auto"):
        self.limits = limits or Limits()
        self.weaknesses: dict[str, str] = {}  # the stronger walls that do not work here, and why
        if isolation not in ("auto", *Isolation):
            raise ConfigError(f"isolation {isolation!r}: it must be auto, {', '.join(Isolation)}")
        if isolation == "auto":
            self.isolation, self.weaknesses = strongest_isolation()
        elif reason := refusal(Isolation(isolation)):
            raise ConfigError(f"isolation {isolation} does not work on this machine: {reason}")
        else:
            self.isolation = Isolation(isolation)

    def call(self, program: str, calls: Sequence[Call]) -> Run:
        """Load a program as a module and put questions to it, one after another, in one process."""
        answers: list[Answer] = []
        with _Process(self.limits, self.isolation, "call") as process:
            error = None
            try:
                error = process.ask({"program": program}).error
                for call in () if error else calls:
                    answers.append(process.ask(call.message()))
                ending = Ending.RAISED if error else Ending.FINISHED
            except _Stopped as stop:
                ending = stop.ending
            run = Run(ending, answers, process.output, process.seconds, error)
        return process.verdict(run)

    def script(self, program: str, stdin: str = "", wall_s: float | None = None) -> Run:
        """Run a program as __main__ on some standard input; `output` is what it printed. `wall_s` can lower the limit."""
        limits = replace(self.limits, wall_s=min(wall_s or self.limits.wall_s, self.limits.wall_s))
        with _Process(limits, self.isolation, "script") as process:
            try:
                process.tell({"program": program, "stdin": stdin})
                ending = Ending.FINISHED if process.finish() == 0 else Ending.RAISED
            except _Stopped as stop:
                ending = stop.ending
            run = Run(ending, [], process.output, process.seconds)
        return process.verdict(run)


def strongest_isolation() -> tuple[Isolation, dict[str, str]]:
    """The strongest wall that holds a program here, and why the stronger ones do not. Raises ConfigError without any."""
    refusals: dict[str, str] = {}
    for isolation in WALLS:
        if (reason := refusal(isolation)) is None:
            return isolation, refusals
        refusals[isolation.value] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise ConfigError(
        f"no wall stands around programs on this machine ({reasons}): install bubblewrap and libseccomp2, or run where the "
        "kernel has namespaces or Landlock; `isolation: interpreter` among the options of code_tests runs them without one"
    )


@functools.cache
def refusal(isolation: Isolation) -> str | None:
    """Why this level does not work here; None if it does: a program has been run in it."""
    try:
        with _Process(Limits(wall_s=START_S), isolation, "call") as process:
            process.ask({"program": ""})
    except (RolloutError, _Stopped) as problem:
        return str(problem)
    return "; ".join(process.left) or None


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
        self._said = ""
        self.left: list[str] = []  # what the program left, known at the end

    def __enter__(self) -> "_Process":
        bwrap, filters = self._wall()
        self._null = _owner_and_mode("/dev/null")
        self.folder = tempfile.mkdtemp(prefix="dfactory-sandbox-")
        request_read, self._request = os.pipe()
        self._reply, reply_write = os.pipe()
        spec = {
            "isolation": self.isolation,
            "mode": self.mode,
            "folder": self.folder,
            "file_bytes": self.limits.file_mb << 20,
            "limits": self.limits.rlimits(),
            "filters": filters,
            "bwrap": bwrap,
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
        self._note_what_is_left()
        self._launcher.stdout.close()
        self._launcher.stderr.close()
        os.close(self._request)
        os.close(self._reply)

    def _wall(self) -> tuple[str | None, dict[str, str]]:
        """Where bwrap is, and the filters of system calls. Raises RolloutError if the level lacks its tool."""
        bwrap = shutil.which("bwrap")
        if self.isolation is Isolation.BUBBLEWRAP and bwrap is None:
            raise RolloutError("bwrap is not installed: the package is called bubblewrap")
        try:
            return bwrap, {"processes": filter_text(True), "alone": filter_text(False)}
        except RolloutError:
            if self.isolation is not Isolation.INTERPRETER:
                raise
            return bwrap, {"processes": "", "alone": ""}

    def _note_what_is_left(self) -> None:
        """Complaints of the launcher about processes; the folder; the one file of the machine's that could be written to."""
        self.left += [line for line in self._complaints() if line.startswith("left: ")]
        if not os.path.isdir(self.folder):
            self.left.append("its folder was taken away")
        elif reason := remove_tree(self.folder):
            self.left.append(f"its folder cannot be removed: {reason}")
        if _owner_and_mode("/dev/null") != self._null:
            self.left.append("/dev/null has another owner or mode")

    def _complaints(self) -> list[str]:
        """What the launcher and bwrap have said so far."""
        os.set_blocking(self._launcher.stderr.fileno(), False)
        self._said += (self._launcher.stderr.read() or b"").decode(errors="replace")
        return self._said.strip().splitlines()

    def verdict(self, run: Run) -> Run:
        """The run, or one without answers if it left something."""
        return replace(run, ending=Ending.LEFT_BEHIND, answers=[]) if self.left else run

    @property
    def seconds(self) -> float:
        return self.limits.wall_s - (self.deadline - time.monotonic())

    @property
    def output(self) -> str:
        return self._printed.decode(errors="replace")

    def tell(self, message: dict) -> None:
        """Start sending a message; `pump` continues."""
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
            reason = self._complaints()
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


def remove_tree(folder: str) -> str | None:
    """Why a folder cannot be removed; None when it is gone. No wall lets a program make folders here: it is not deep."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError) as problem:
        return str(problem)
    return None


def _owner_and_mode(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_mode, found.st_uid, found.st_gid
