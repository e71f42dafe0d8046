"""One run holds a run folder from start to end; a second one is refused with the name of the first.

The holder's file names its process: host, start of the machine, pid, start of the process. The process holds a lock on it
(flock) and touches it every BEAT_S seconds. Who finds the file judges by what can be known from where he is:

    the lock is taken            the holder lives
    this machine, not restarted  the kernel tells: the lock is free, so the holder is gone; where the file system has no
                                 locks, whether the process with that pid and that start is there
    anything else                file systems differ in whether a lock reaches other machines, so the holder lives if the
                                 file is touched within PATIENCE_S; no clocks are compared

So what a killed process or a machine that went down has left does not block the next run.

A run is held as RUN by its first rank, in reinforcement learning by the driver; the first learner, which Ray may have put on
another machine and which may outlive its driver for a moment, holds LEARNER.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from dfactory import distributed
from dfactory.errors import ConfigError
from dfactory.runs.folder import RunFolder, writing

RUN, LEARNER = ".owner", ".owner-learner"
BEAT_S, PATIENCE_S = 5.0, 30.0
SAME_START_S = 2.0  # two readings of a process's start within this are equal: the clock may have been set


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process on a machine."""

    host: str
    boot: str  # of the machine: another one after each start
    pid: int
    started: float  # seconds since the epoch

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started))
        return f"process {self.pid} on {self.host}, started {since}"

    @property
    def is_there(self) -> bool:
        """Whether the named process runs on this machine."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) <= SAME_START_S
        except psutil.NoSuchProcess:
            return False


def is_running(folder: Path) -> bool:
    """Whether a run seems to hold the folder, for who only looks: the lock is left alone, so that no run is refused because
    of a look at it. On another machine a run lives if its file was touched within PATIENCE_S by this machine's clock."""
    file = folder / RUN
    try:
        owner, touched = Owner(**json.loads(file.read_bytes())), file.stat().st_mtime
    except (OSError, ValueError, TypeError):  # there is none, or it is just being written
        return False
    return owner.is_there if owner.boot == _boot() else time.time() - touched <= PATIENCE_S


def this_owner() -> Owner:
    process = psutil.Process()
    return Owner(socket.gethostname(), _boot(), process.pid, process.create_time())


def _boot() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else str(psutil.boot_time())


@contextlib.contextmanager
def one_run(folder: RunFolder, driven: bool) -> Iterator[None]:
    """Hold the folder for all ranks, which call this together. `driven`: an RL driver already holds it as RUN."""
    with contextlib.ExitStack() as stack:
        held = held_by_learner(folder) if driven else held_by_run(folder)
        distributed.on_first_rank(lambda: stack.enter_context(held))
        yield


@contextlib.contextmanager
def held_by_run(folder: RunFolder) -> Iterator[None]:
    """Raise ConfigError if another run holds the folder. Learners whose driver is gone get a moment to end."""
    with _Held(folder.path, RUN):
        if (folder.path / LEARNER).exists():
            _wait_for_learner(folder.path)
        yield


def held_by_learner(folder: RunFolder) -> contextlib.AbstractContextManager:
    return _Held(folder.path, LEARNER)


def _wait_for_learner(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with _Held(path, LEARNER):
                return
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(min(1.0, PATIENCE_S / 10))


class _Held:
    """A context in which this process holds a file of a folder."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.file = folder, folder / name
        self.created = False  # the folder
        self.ended = threading.Event()

    def __enter__(self) -> None:
        with writing(self.folder):
            self.created = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.handle, locked = self._open()
        try:
            self._claim(locked)
        except BaseException:
            os.close(self.handle)
            raise
        threading.Thread(target=self._beat, daemon=True).start()

    def __exit__(self, *_) -> None:
        self.ended.set()
        with contextlib.suppress(OSError):  # the folder was removed
            self.file.unlink()
        os.close(self.handle)
        if self.created:
            with contextlib.suppress(OSError):  # a refused run that has written nothing leaves no folder
                self.folder.rmdir()

    def _open(self) -> tuple[int, bool | None]:
        """The open file, and whether it is locked now: None if the file system has no locks. Raises ConfigError if
        another process has locked it."""
        while True:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            locked = self._lock(handle)
            if self._is_current(handle):
                return handle, locked
            os.close(handle)  # its holder has just ended, and removed it

    def _lock(self, handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._read()
            os.close(handle)
            raise self._refusal(owner) from None
        except OSError:
            return False
        return True

    def _is_current(self, handle: int) -> bool:
        mine = os.fstat(handle)
        try:
            there = self.file.stat()
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def _claim(self, locked: bool) -> None:
        me = this_owner()
        if self._size() and self._lives(self._read(), me, locked):
            raise self._refusal(self._read())
        with writing(self.file):
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, json.dumps(dataclasses.asdict(me)).encode(), 0)
            os.fsync(self.handle)
        if not locked:  # two runs may get here at the same time: the last writer holds it
            time.sleep(PATIENCE_S / 10)
            if (owner := self._read()) != me:
                raise self._refusal(owner)

    def _size(self) -> int:
        return os.fstat(self.handle).st_size

    def _lives(self, owner: Owner | None, me: Owner, locked: bool) -> bool:
        if owner is not None and owner.boot == me.boot:
            return not locked and owner.is_there
        print(
            f"{self.file} names {owner or 'nobody'}: does it still run? {PATIENCE_S:g} s", file=sys.stderr, flush=True
        )
        first, deadline = self._touched(), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(PATIENCE_S / 30)
            if self._touched() != first:
                return True
        return False

    def _touched(self) -> int:
        with self.file.open("rb") as stream:  # opened: a network file system then asks its server
            return os.fstat(stream.fileno()).st_mtime_ns

    def _read(self) -> Owner | None:
        try:
            return Owner(**json.loads(self.file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _refusal(self, owner: Owner | None) -> ConfigError:
        return ConfigError(
            f"output_dir {self.folder} is held by another run: {owner or 'one that is just starting'}. Wait for its end or "
            "end it, or choose another output_dir"
        )

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.file)
