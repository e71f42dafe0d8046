"""Hostile requests against a real server, one by one and all at once. Each has its outcome, /health answers within a second
meanwhile, and SIGTERM is answered in the midst of them.
"""

import math
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.serving.attacks import ATTACKS, CLOSED, Attack, send
from tests.serving.conftest import serving

HEALTH_S, SIGNAL_S = 1.0, 5.0
TRIES = 3  # other programs on the machine can hold up an answer as well: the best of so many counts
WORDS = ("--max-length", "256", "--client-timeout", "3")
GROWTH = 200 * 2**20  # bytes of the server's memory, all attacks together


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("attacked"), *WORDS, batch_size=4) as server:
        yield server


class Health(threading.Thread):
    """Asks for /health all the time, each time on a new connection; `worst` is the longest that it took."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.worst, self.over, self.asked = url, 0.0, threading.Event(), 0
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            started = time.monotonic()
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=60).close()
            except OSError:  # of which a status that is no 200 is one
                self.worst = math.inf
            self.worst = max(self.worst, time.monotonic() - started)
            self.asked += 1
            self.over.wait(0.02)

    def __enter__(self) -> "Health":
        return self

    def __exit__(self, *problem) -> None:
        self.over.set()
        self.join(60)


def problem_of(server, attack: Attack) -> str | None:
    """What was wrong with the try that held up /health least."""
    tries = []
    while not tries or (tries[-1][0] >= HEALTH_S and len(tries) < TRIES):
        with Health(server.url) as health:
            status, said = send(server.url, attack, 60)
        tries.append((health.worst, status, said))
    worst, status, said = min(tries)
    if status in attack.outcomes and attack.told in said and worst < HEALTH_S:
        return None
    return f"{attack.name}: {status} {said[-200:]!r}, /health {worst:.2f} s"


def test_there_are_sixty():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 60


@pytest.mark.slow
def test_each_has_its_outcome_and_the_server_answers_meanwhile(server):
    """One by one, but for those that wait for the server's patience to end."""
    memory = psutil.Process(server.process.pid).memory_info().rss
    patient = [attack for attack in ATTACKS if {CLOSED, 408}.intersection(attack.outcomes)]
    problems = [problem_of(server, attack) for attack in ATTACKS if attack not in patient]
    with ThreadPoolExecutor(len(patient)) as pool:
        problems += pool.map(lambda attack: problem_of(server, attack), patient)
    assert not any(problems), "\n".join(filter(None, problems))
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()
    assert psutil.Process(server.process.pid).memory_info().rss - memory < GROWTH


@pytest.mark.slow
def test_all_at_once_and_a_signal(tmp_path):
    """Twice each, in as many threads. After the signal a request is answered, refused, or finds nobody there."""
    with serving(tmp_path, *WORDS, batch_size=4) as server, ThreadPoolExecutor(2 * len(ATTACKS)) as pool:
        with Health(server.url) as health:
            sent = [pool.submit(send, server.url, attack, 60) for attack in ATTACKS * 2]
            time.sleep(2)
        assert health.asked
        server.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        while "draining" not in server.log.read_text():
            assert time.monotonic() - signalled < SIGNAL_S
            time.sleep(0.01)
        assert server.process.wait(60) == 0
        assert all(isinstance(result.exception(), OSError | None) for result in sent)
        assert "Traceback" not in server.log.read_text()
