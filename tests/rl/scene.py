"""What attack programs find: something to steal, somewhere to write, somebody who listens. And what they left.

python -m tests.rl.scene          the table of SECURITY.md: all programs at all levels
"""

import contextlib
import ctypes
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from dfactory.errors import ConfigError
from dfactory.rl.rewards.code_tests import code_tests
from dfactory.rl.sandbox import Isolation, Sandbox
from tests.rl.attacks import ATTACKS

WALL_S = 0.4
LONGEST_S = 5.0  # a program may take, with the start of its sandbox and what follows
TESTS = [{"call": "add", "args": [a, b], "expected": a + b} for a, b in ((2, 3), (-7, 7), (12345, 67890))]
SCRIPT = [{"stdin": "2 3", "stdout": "5"}]
MARK = "dfactory-test-left"


@dataclass(frozen=True)
class Verdict:
    score: float
    seconds: float
    left: list[str]

    @property
    def holds(self) -> bool:
        return self.score == 0 and self.seconds < LONGEST_S and not self.left


class Scene:
    """`things` is what stands in the programs' {braces}."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.secret = folder / "secret"
        self.secret.write_text("expected = 5")
        name = f"dfactory-test-{os.getpid()}"
        self.shared = Path("/dev/shm" if Path("/dev/shm").is_dir() else folder) / name
        self.shared.write_text("expected")
        self.key = keys("add_key", b"user", name.encode(), b"expected", 8, -3)  # in the keyring of this session
        self.handle = os.open(self.secret, os.O_RDONLY)
        os.set_inheritable(self.handle, True)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind(f"\0{name}")
        self.local.listen()
        self.things = {
            "secret": self.secret,
            "outside": folder / "outside",
            "port": self.server.getsockname()[1],
            "abstract": name,
            "parent": os.getpid(),
            "repository": Path(__file__).parents[2],
            "shared": self.shared,
        }
        os.environ["SECRET_TOKEN"] = "hunter2"
        self.before = self._state()
        self.children = set(psutil.Process().children(recursive=True))  # of tests before, such as a resource tracker

    def close(self) -> None:
        for file in (self.server, self.local):
            file.close()
        os.close(self.handle)
        self.shared.unlink()
        del os.environ["SECRET_TOKEN"]
        if self.key > 0:
            keys("keyctl", 21, self.key)  # it is invalid from now on

    def filled(self, program: str) -> str:
        for key, value in self.things.items():
            program = program.replace("{" + key + "}", str(value))
        return program.replace("{{", "{").replace("}}", "}")

    def attack(self, name: str, isolation: str, script: bool = False) -> Verdict:
        """Let a program of the table ask for its reward. One that took too long is asked again: on a busy machine an end
        comes late once, and what hangs hangs every time."""
        program, tests = self.filled(ATTACKS[name]), TESTS
        if script:
            program, tests = f"{program}\nprint(add(2, 3))", SCRIPT
        first = self._verdict(program, tests, isolation)
        late = first.score == 0 and not first.left and first.seconds >= LONGEST_S
        return self._verdict(program, tests, isolation) if late else first

    def _verdict(self, program: str, tests: list[dict], isolation: str) -> Verdict:
        started = time.monotonic()
        score = code_tests([""], [f"```python\n{program}\n```"], tests=[tests], timeout_s=WALL_S, isolation=isolation)[
            0
        ]
        return Verdict(score, time.monotonic() - started, self.left())

    def left(self) -> list[str]:
        """Processes, files, keys, sockets, modes and times that are not as they were."""
        after = self._state()
        found = [f"{name}: {after[name]}" for name in after if after[name] != self.before[name]]
        if children := set(psutil.Process().children(recursive=True)) - self.children:
            found.append(f"processes: {children}")
        return found

    def _state(self) -> dict:
        looked_at = {"/dev/null": os.stat("/dev/null"), "the secret": os.stat(self.secret)}
        return {
            "modes": {name: (s.st_mode, s.st_uid, s.st_gid, s.st_size) for name, s in looked_at.items()},
            "times": (
                looked_at["/dev/null"].st_mtime if looked_at["/dev/null"].st_mtime < 1 else 0,
                self.secret.stat().st_mtime,
            ),
            "files": sorted(path.name for path in self.folder.iterdir())
            + [str(place) for place in _places() for place in place.glob(f"*{MARK}*")],
            "attributes": os.listxattr(self.secret),
            "keys": _user_keys(),
            "sockets": Path("/proc/net/unix").read_text().count(str(self.folder)),
            "priority": (os.getpriority(os.PRIO_PROCESS, 0), len(os.sched_getaffinity(0))),
        }


def _places() -> list[Path]:
    return [Path(tempfile.gettempdir()), Path("/"), Path(os.__file__).parent]


def keys(call: str, *arguments) -> int:
    """The kernel's calls for keys; -1 where it has none."""
    number = {"x86_64": (248, 250)}.get(os.uname().machine, (217, 219))[call == "keyctl"]
    return ctypes.CDLL(None).syscall(number, *arguments)


def _user_keys() -> bytes:
    """What this user's keyring holds."""
    found = ctypes.create_string_buffer(4096)
    size = keys("keyctl", 11, -4, found, 4096)
    return found.raw[: max(size, 0)]


@contextlib.contextmanager
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="scene-") as folder:
        made = Scene(Path(folder))
        try:
            yield made
        finally:
            made.close()


def main() -> None:
    print("| level | programs | score 0 | slowest | left something |\n|---|---|---|---|---|")
    with scene() as place:
        for isolation in Isolation:
            try:
                Sandbox(isolation=isolation)
            except ConfigError as problem:
                print(f"| {isolation} | not run: {problem} | | | |")
                continue
            verdicts = {}
            for name in ATTACKS:
                verdict = verdicts[name] = place.attack(name, isolation)
                print(
                    f"{isolation:12} {name:55} {verdict.score:g} {verdict.seconds:5.2f} s {verdict.left}",
                    file=sys.stderr,
                )
            scored = sum(verdict.score == 0 for verdict in verdicts.values())
            slowest = max(verdict.seconds for verdict in verdicts.values())
            leaving = [name for name, verdict in verdicts.items() if verdict.left]
            print(f"| {isolation} | {len(verdicts)} | {scored} | {slowest:.1f} s | {leaving or 'none'} |", flush=True)


if __name__ == "__main__":
    main()
