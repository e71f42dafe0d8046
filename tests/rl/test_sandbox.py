"""Attacks on the sandbox: every one scores 0 in bounded time and leaves nothing behind, and honest programs score 1."""

import ctypes
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from dfactory.errors import ConfigError, RolloutError
from dfactory.rl.rewards.code_tests import code_tests
from dfactory.rl.sandbox import WALLS, Call, Ending, Isolation, Limits, Sandbox, refusal, strongest_isolation
from dfactory.rl.sandbox import sandbox as sandbox_module
from dfactory.rl.sandbox.answers import same
from dfactory.rl.sandbox.filter import filter_text
from tests.rl.attacks import ATTACKS, KERNEL, REAL, SIGNALS_AND_FOLDERS
from tests.rl.scene import TESTS, WALL_S, scene

AT_ONCE = ["fork bomb", "memory at once", "a gigabyte of output", "deep answer", "huge answer", "infinite loop",
           "ignores every signal", "reads a secret file", "connects", "kills its parent", "leaves a daemon",
           "writes outside", "exit status 0", "equal to everything", "answers on every channel", "patches json",
           *SIGNALS_AND_FOLDERS, *KERNEL]  # fmt: skip


STRONGEST = {strongest_isolation()[0]}


def slow_unless(quick, *values):
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


def needs(isolation):
    try:
        return Sandbox(Limits(wall_s=WALL_S, cpu_s=2), isolation)
    except ConfigError as problem:
        pytest.skip(str(problem))


def sandboxed_processes():
    """Processes that run in a folder or with the environment of a sandbox; orphans too, but not those of another judge."""
    found = []
    for process in psutil.process_iter():
        try:
            text = Path(f"/proc/{process.pid}/environ").read_bytes() + " ".join(process.cmdline()).encode()
            if any(mark in text for mark in (b"HOME=/work", b"dfactory-sandbox-", b"sandbox/launcher")):
                found += [process] if not another_judge(process) else []
        except (OSError, psutil.Error):
            continue
    return found


def another_judge(process):
    """Whether a live process that is none of ours, such as a neighbour under pytest-xdist, holds its launcher."""
    family = [process, *process.parents()]
    launchers = [one for one in family if any("sandbox/launcher" in word for word in one.cmdline())]
    if not launchers or any(one.pid == os.getpid() for one in family):
        return False
    holder = launchers[-1].parent()
    return holder is not None and "python" in holder.name()


@pytest.fixture(scope="module")
def place():
    with scene() as made:
        yield made


@pytest.fixture
def world(place):
    """The scene; and nothing may be left of what ran."""
    yield place
    assert not place.left()
    psutil.wait_procs(sandboxed_processes(), timeout=2)
    assert not sandboxed_processes()


def score(program, tests, isolation, timeout_s=WALL_S):
    return code_tests([""], [f"```python\n{program}\n```"], tests=[tests], timeout_s=timeout_s, isolation=isolation)


def test_the_table_is_large():
    assert len(ATTACKS) >= 160


@pytest.mark.parametrize("isolation", [slow_unless(isolation in STRONGEST, isolation) for isolation in Isolation])
def test_attacks(isolation, world):
    """The worst of the table, and what once broke out."""
    needs(isolation)
    verdicts = {name: world.attack(name, isolation) for name in AT_ONCE}
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.holds} == {}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", [False, True], ids=["call", "script"])
@pytest.mark.parametrize("isolation", list(Isolation))
def test_every_attack(isolation, script, world):
    needs(isolation)
    verdicts = {name: world.attack(name, isolation, script) for name in ATTACKS if script or name not in AT_ONCE}
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.holds} == {}


def test_attacks_do_work_outside_of_the_sandbox(world, tmp_path):
    """Else the tests above would show nothing. Those that do no harm, run as they are."""
    for name in REAL:
        if name == "reads the keyring" and world.key < 0:
            continue
        program = world.filled(ATTACKS[name]) + "\nassert add(2, 3) == 5"
        folder = tmp_path / name.replace("/", "")
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


@pytest.mark.parametrize("isolation", [slow_unless(isolation in STRONGEST, isolation) for isolation in Isolation])
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
    deadline = time.monotonic() + 90
    while len(sandboxed_processes()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(sandboxed_processes()) >= 4
    asking.send_signal(signal.SIGKILL)
    asking.wait()


@pytest.fixture
def refusing(monkeypatch):
    """Broken launchers for the levels in a set."""
    refused, begin = set(), sandbox_module._Process.__enter__

    def enter(process):
        if process.isolation in refused:
            raise RolloutError("unshare: Operation not permitted")
        return begin(process)

    monkeypatch.setattr(sandbox_module._Process, "__enter__", enter)
    refusal.cache_clear()
    yield refused
    refusal.cache_clear()


def test_a_machine_without_namespaces_falls_back_and_says_so(refusing, world):
    """The weaker wall is taken, the reasons are kept, a demand is refused."""
    needs(Isolation.LANDLOCK)
    refusal.cache_clear()
    refusing |= {Isolation.BUBBLEWRAP, Isolation.NAMESPACES}
    sandbox = Sandbox()
    assert sandbox.isolation is Isolation.LANDLOCK
    assert "not permitted" in sandbox.weaknesses["namespaces"]
    assert sandbox.call("def f(): return 1", [Call("f")]).answers[0].equals(1)
    with pytest.raises(ConfigError, match="isolation namespaces does not work on this machine: unshare"):
        Sandbox(isolation="namespaces")
    with pytest.raises(ConfigError, match="it must be auto, bubblewrap, namespaces, landlock, interpreter"):
        Sandbox(isolation="jail")


def test_what_is_no_wall_is_taken_only_by_its_name(refusing):
    refusing |= set(WALLS)
    with pytest.raises(ConfigError, match=r"no wall .* \(bubblewrap: unshare.*landlock: .*isolation: interpreter"):
        Sandbox()
    assert Sandbox(isolation="interpreter").isolation is Isolation.INTERPRETER


def test_without_libseccomp_there_is_no_wall(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    filter_text.cache_clear()
    refusal.cache_clear()
    with pytest.raises(ConfigError, match="install the package libseccomp2"):
        Sandbox()
    assert score("def add(a, b): return a + b", TESTS, "interpreter", 10) == [1.0]
    monkeypatch.undo()
    filter_text.cache_clear()
    refusal.cache_clear()


TAKES_ITS_FOLDER_AWAY = """
import os, shutil
here = os.getcwd()
os.chdir('/')
os.{call}
def add(a, b): return a + b
"""


@pytest.mark.parametrize("call", ["rmdir(here)", "rename(here, here + '-left')"])
def test_a_program_whose_folder_is_gone_scores_0(call, monkeypatch, tmp_path):
    """No level lets it, so the hook is taken out: what is left behind is a verdict, and no exception."""
    unguarded = tmp_path / "runner.py"
    unguarded.write_text(sandbox_module.RUNNER.read_text().replace("sys.addaudithook(guard)", "pass"))
    monkeypatch.setattr(sandbox_module, "RUNNER", unguarded)
    box = Sandbox(Limits(wall_s=10), "interpreter")
    run = box.call(TAKES_ITS_FOLDER_AWAY.replace("{call}", call), [Call("add", [1, 2])])
    assert (run.ending, run.answers) == (Ending.LEFT_BEHIND, [])
    for left in Path(tempfile.gettempdir()).glob("dfactory-sandbox-*-left"):
        left.rmdir()


def without_capabilities(*numbers):
    """Give up some of root's capabilities for good, as a container does that has no second user."""
    libc = ctypes.CDLL(None)
    for number in numbers:
        assert libc.prctl(24, number, 0, 0, 0) == 0
    header, sets = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    assert libc.capget(header, sets) == 0
    words = list(struct.unpack("6I", sets.raw))
    for place in range(3):
        words[place] &= ~sum(1 << number for number in numbers)
    assert libc.capset(header, struct.pack("6I", *words)) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_without_a_second_user(world):
    """bwrap is refused, since it would run as root's user; the namespaces hold, though /dev/null is root's in there too."""
    needs(Isolation.NAMESPACES)
    names = [name for name in ATTACKS if "/dev/null" in name or "fork" in name] + [
        "kills everybody",
        "writes into Python",
    ]
    code = "import sys\nfrom tests.rl.scene import *\nwith scene() as place:\n"
    code += f"    print({{n: v for n in {names!r} if not (v := place.attack(n, 'namespaces')).holds}})\n"
    code += "    print(Sandbox().weaknesses.get('bubblewrap'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: without_capabilities(6, 7),  # CAP_SETGID, CAP_SETUID
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[0] == "{}", done.stdout + done.stderr
    assert "not permitted" in done.stdout or "not installed" in done.stdout


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
