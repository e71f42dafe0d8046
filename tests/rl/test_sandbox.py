"""Attacks on the sandbox: every one scores 0 in bounded time and leaves nothing behind, and honest programs score 1."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dfactory.errors import ConfigError, RolloutError
from dfactory.rl import sandbox as sandbox_module
from dfactory.rl.rewards.code_tests import code_tests
from dfactory.rl.sandbox import Call, Ending, Isolation, Limits, Sandbox, same, strongest_isolation
from tests.rl.attacks import ATTACKS, FORGED, OUTSIDE, REAL

WALL_S = 0.4
TESTS = [{"call": "add", "args": [a, b], "expected": a + b} for a, b in ((2, 3), (-7, 7), (12345, 67890))]


STRONGEST = strongest_isolation()[0]
QUICK = FORGED.keys() | OUTSIDE.keys() | {"infinite loop", "ignores every signal", "fork bomb", "memory at once",
                                          "a gigabyte of output", "deep answer", "huge answer"}  # fmt: skip


def slow_unless(quick, *values):
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


ATTACKS_AT_EVERY_LEVEL = [
    slow_unless(name in QUICK and isolation is STRONGEST, name, isolation)
    for isolation in Isolation
    for name in ATTACKS
]


def needs(isolation):
    try:
        return Sandbox(Limits(wall_s=WALL_S, cpu_s=2), isolation)
    except ConfigError as problem:
        pytest.skip(str(problem))


def sandboxed_processes():
    """Processes that run in a folder or with the environment of a sandbox; orphans too, but not what another process of
    this test run has started and still holds."""
    found = []
    for process in psutil.process_iter():
        try:
            text = Path(f"/proc/{process.pid}/environ").read_bytes() + " ".join(process.cmdline()).encode()
            ancestors = {parent.pid for parent in process.parents()}
        except (OSError, psutil.Error):
            continue
        is_sandboxed = b"HOME=/work" in text or b"dfactory-sandbox-" in text or b"sandbox_launcher" in text
        if is_sandboxed and not ancestors & other_test_processes():
            found.append(process)
    return found


def other_test_processes():
    """The neighbours of this process under pytest-xdist."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return set()
    return {process.pid for process in psutil.Process(os.getppid()).children()} - {os.getpid()}


def keys(call, *arguments):
    """The kernel's calls for keys; -1 where it has none."""
    number = {"x86_64": (248, 250)}.get(os.uname().machine, (217, 219))[call == "keyctl"]
    return ctypes.CDLL(None).syscall(number, *arguments)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Something to steal, somewhere to write, somebody who listens; and nothing may be left of what ran."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    secret = tmp_path / "secret"
    secret.write_text("expected = 5")
    abstract = f"dfactory-test-{os.getpid()}"
    shared = Path("/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) / f"dfactory-test-{os.getpid()}"
    shared.write_text("expected")
    key = keys("add_key", b"user", abstract.encode(), b"expected", 8, -3)  # in the keyring of this session
    handle = os.open(secret, os.O_RDONLY)
    os.set_inheritable(handle, True)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{abstract}")
        local.listen()
        yield {
            "secret": secret,
            "outside": tmp_path / "outside",
            "port": server.getsockname()[1],
            "abstract": abstract,
            "parent": os.getpid(),
            "repository": Path(__file__).parents[2],
            "shared": shared,
            "key": key,
        }
    os.close(handle)
    shared.unlink()
    if key > 0:
        keys("keyctl", 21, key)  # it is invalid from now on
    assert secret.read_text() == "expected = 5"
    assert not (tmp_path / "outside").exists()
    assert not psutil.Process().children(recursive=True)
    psutil.wait_procs(sandboxed_processes(), timeout=2)
    assert not sandboxed_processes()


def filled(program, world):
    for key, value in world.items():
        program = program.replace("{" + key + "}", str(value))
    return program.replace("{{", "{").replace("}}", "}")


def score(program, tests, isolation, timeout_s=WALL_S):
    return code_tests([""], [f"```python\n{program}\n```"], tests=[tests], timeout_s=timeout_s, isolation=isolation)


@pytest.mark.parametrize("name, isolation", ATTACKS_AT_EVERY_LEVEL)
def test_attack(name, isolation, world):
    needs(isolation)
    started = time.monotonic()
    assert score(filled(ATTACKS[name], world), TESTS, isolation) == [0.0]
    assert time.monotonic() - started < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("isolation", list(Isolation))
def test_attack_by_a_script(name, isolation, world):
    needs(isolation)
    started = time.monotonic()
    program = filled(ATTACKS[name], world) + "\nprint(add(2, 3))"
    assert score(program, [{"stdin": "2 3", "stdout": "5"}], isolation) == [0.0]
    assert time.monotonic() - started < 5


def test_attacks_do_work_outside_of_the_sandbox(world):
    """Else the tests above would show nothing. Those that do no harm, run as they are."""
    for name in REAL:
        if name == "reads the keyring" and world["key"] < 0:
            continue
        program = filled(ATTACKS[name], world) + "\nassert add(2, 3) == 5"
        folder = world["secret"].parent / name.replace("/", "")
        folder.mkdir()
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, close_fds=False)
        assert done.returncode == 0, f"{name}: {done.stderr}"


HONEST = {
    "plain": "def add(a, b): return a + b",
    "imports": "import bisect, collections, functools, heapq, itertools, json, math, random, re, string, typing\n"
    "def add(a, b): return a + b",
    "classes": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef add(a, b): return P(a + b).x",
    "a number of its own kind": "import enum\nclass N(int): pass\ndef add(a, b): return N(a + b)",
    "threads": "import threading\ndef add(a, b):\n    r = []\n    t = threading.Thread(target=lambda: r.append(a + b))\n"
    "    t.start(); t.join()\n    return r[0]",
    "files": "def add(a, b):\n    open('x', 'w').write(str(a + b))\n    return int(open('x').read())",
    "prints": "print('hello')\ndef add(a, b):\n    print(a, b)\n    return a + b",
    "recursion": "def add(a, b): return b if a == 0 else add(a - 1, b) + 1 if 0 < a < 500 else a + b",
    "main": "def add(a, b): return a + b\nif __name__ == '__main__':\n    assert False",
}


@pytest.mark.parametrize("isolation", [slow_unless(isolation is STRONGEST, isolation) for isolation in Isolation])
def test_honest_programs(isolation, world):
    needs(isolation)
    for name, program in HONEST.items():
        assert score(program, TESTS, isolation, timeout_s=10) == [1.0], name
    script = "import sys\na, b = map(int, sys.stdin.read().split())\nprint(a + b)\nexit()"
    assert score(script, [{"stdin": "2 3", "stdout": "5\n"}, {"stdin": "1\n1\n", "stdout": "2"}], isolation, 10) == [
        1.0
    ]


def test_how_programs_end(world):
    sandbox = Sandbox(Limits(wall_s=WALL_S, output_bytes=1000))
    asked = [Call("add", [1, 2])]
    ends = {
        "def add(a, b): return 3": Ending.FINISHED,
        "def add(a, b": Ending.RAISED,
        "1 / 0": Ending.RAISED,
        "while True: pass": Ending.TIMEOUT,
        "print('x' * 10000, flush=True)\ndef add(a, b):\n    while True: pass": Ending.OUTPUT_LIMIT,
        "def add(a, b): return 'x' * 10000": Ending.OUTPUT_LIMIT,
        "import os\nos._exit(0)": Ending.DIED,
        "import os\ndef add(a, b):\n    for n in range(3, 1024):\n        try: os.write(n, b'[]\\n')\n"
        "        except OSError: pass\n    return 3": Ending.OUT_OF_TURN,
    }
    for program, ending in ends.items():
        assert sandbox.call(program, asked).ending is ending, program
    assert sandbox.call("1 / 0", asked).error == "ZeroDivisionError"
    assert sandbox.script("raise SystemExit(3)").ending is Ending.RAISED
    assert sandbox.script("import os\nos.closerange(0, 64)\nwhile True: pass").ending is Ending.TIMEOUT
    assert sandbox.script("print('ok')").output == "ok\n"


def test_endings_are_logged():
    logged = {}
    programs = ["def add(a, b): return a + b", "while True: pass", "import sys\nsys.exit()", "x"]
    code_tests([""] * 4, programs, tests=[TESTS] * 4, timeout_s=WALL_S, log_metric=logged.__setitem__)
    assert {name: share for name, share in logged.items() if share} == {
        f"code_tests/{ending}": 0.25 for ending in ("finished", "timeout", "died", "raised")
    }


def test_nothing_survives_the_process_that_asked(world):
    """A reward process that is killed takes the program with it."""
    code = "from dfactory.rl.sandbox import *\n"
    code += "Sandbox(Limits(wall_s=1000)).call('import os\\n0 if os.fork() else os.setsid()\\nwhile True: pass', [])"
    asking = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while len(sandboxed_processes()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(sandboxed_processes()) >= 4
    asking.send_signal(signal.SIGKILL)
    asking.wait()


def test_a_machine_without_namespaces_falls_back_and_says_so(monkeypatch, world):
    """A broken launcher for the strong level: the weaker one is taken, the reason is kept, a demand is refused."""
    strongest_isolation.cache_clear()
    begin = sandbox_module._Process.__enter__

    def refuse(process):
        if process.isolation is Isolation.NAMESPACES:
            raise RolloutError("unshare: Operation not permitted")
        return begin(process)

    monkeypatch.setattr(sandbox_module._Process, "__enter__", refuse)
    sandbox = Sandbox()
    assert sandbox.isolation is not Isolation.NAMESPACES
    assert "not permitted" in sandbox.weaknesses["namespaces"]
    assert sandbox.call("def f(): return 1", [Call("f")]).answers[0].equals(1)
    with pytest.raises(ConfigError, match="isolation namespaces does not work on this machine: unshare"):
        Sandbox(isolation="namespaces")
    strongest_isolation.cache_clear()
    with pytest.raises(ConfigError, match="it must be auto, namespaces, landlock, interpreter"):
        Sandbox(isolation="jail")


def encoded(value):
    """A value as it comes back from the runner."""
    return Sandbox().call(f"value = {value}", [Call(expression="value")]).answers[0].value


@pytest.mark.parametrize(
    "written",
    ["None", "True", "-7", "2**70", "-(2**70)", "1.5", "float('inf')", "'é'", "[1, [2]]", "(1, 'a')", "{1, (2, 3)}",
     "frozenset([1])", "{1: 'a', (1, 2): [3]}", "{'a': {'b': None}}", "b'ab'", "1 + 2j", "[]", "{}", "set()"],
)  # fmt: skip
def test_plain_values_come_back_equal(written):
    value = eval(written)
    answer = encoded(written)
    assert same(answer, value)
    others = [None, True, 0, 1, "", "a", [], [1], {}, {1: "a"}, set(), {1}, b"", 2j]
    assert [other for other in others if same(answer, other)] == [
        other for other in others if as_lists(other) == as_lists(value)
    ]


def as_lists(value):
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_equality():
    assert same(1.0, 1)
    assert same(True, 1)
    assert not same({"float": "nan"}, float("nan"))
    assert not same(0.1 + 0.2, 0.3)
    assert same(0.1 + 0.2, 0.3, tolerance=1e-9)
    assert same([0.1 + 0.2], [0.3], tolerance=1e-9)
    assert not same({"int": "0x" + "f" * 1000}, 0.3, tolerance=1e-9)
    for hostile in ({"int": "x"}, {"int": 5}, {"float": "1e"}, {"set": 5}, {"set": {"set": []}}, {"dict": [[1]]},
                    {"dict": [5, 6]}, {"complex": []}, {"bytes": None}, {"int": "5", "set": []}, "5", {}):  # fmt: skip
        for expected in (5, 0.5, "x", [1], {1}, {1: 2}, b"x", 1j, None):
            assert not same(hostile, expected)
    assert not same({"set": [1, 1]}, {1, 2})
    assert not same({"dict": [[1, 2], [1, 2]]}, {1: 2, 3: 4})
    with pytest.raises(TypeError, match="no plain value"):
        same(1, object())
