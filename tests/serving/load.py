"""Many requests at once, and many one after the other:

    python -m tests.serving.load --requests 10000

First a storm: 500 requests at once against the queue's bound, 50 of which hang up, some clients slow, and a SIGTERM in the
midst. Every request has exactly one outcome, the server ends with status 0. Then a long run of all kinds of requests at a
server of its own: its memory after a fifth of them and at the end. Exit status 1 where either does not hold.
"""

import argparse
import asyncio
import functools
import json
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil

from tests.serving.conftest import Server, serving

STORM, CANCELS, SLOW = 500, 50, 20
WARM_UP = 0.2
GROWTH = 0.05, 20.0  # a part of the memory after the warm-up, and MB
AT_ONCE = 16  # in the long run
WORDS = ("--max-length", "256", "--drain-timeout", "120")
BODY = {"prompt": "one two three", "max_new_tokens": 24, "threshold": 1.0}  # 24 forwards
SHORT = {"prompt": "one two three", "max_new_tokens": 16}
PATIENCE = aiohttp.ClientTimeout(total=300)


class Storm(NamedTuple):
    outcomes: Counter[str]
    status: int  # that the server ended with
    answered_before: int  # requests that had an outcome when the signal came

    @property
    def problem(self) -> str | None:
        lost = sum(self.outcomes[name] for name in self.outcomes if name.startswith("lost"))
        if lost or self.status != 0:
            return f"{lost} requests lost, the server ended with {self.status}"
        return None


class Memory(NamedTuple):
    """MB of the server."""

    requests: int
    early: float
    late: float

    @property
    def problem(self) -> str | None:
        part, constant = GROWTH
        growth = self.late - self.early
        return f"memory grew by {growth:.1f} MB" if growth > part * self.early + constant else None


# --- clients: each says what became of its request --------------------------------------------------------------------

Client = Callable[[aiohttp.ClientSession, str], Awaitable[str]]


async def whole(session: aiohttp.ClientSession, url: str, ask: dict = BODY) -> str:
    async with session.post(f"{url}/generate", json=ask) as response:
        body = await response.json()
        return _outcome(response.status, "output_ids" in body)


async def streamed(session: aiohttp.ClientSession, url: str, ask: dict = BODY) -> str:
    async with session.post(f"{url}/generate", json=ask | {"stream": True}) as response:
        said = await response.read()
        return _outcome(response.status, said.endswith(b"data: [DONE]\n\n"))


async def slow(session: aiohttp.ClientSession, url: str) -> str:
    """Sends its body in pieces and reads its answer in pieces."""
    text = json.dumps(BODY).encode()

    async def body():
        for start in range(0, len(text), 10):
            yield text[start : start + 10]
            await asyncio.sleep(0.05)

    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/generate", data=body(), headers=headers) as response:
        said = b""
        while piece := await response.content.read(50):
            said += piece
            await asyncio.sleep(0.01)
        return _outcome(response.status, b"output_ids" in said)


async def cancelled(session: aiohttp.ClientSession, url: str, after_s: float = 0.3) -> str:
    try:
        async with asyncio.timeout(after_s):
            return await streamed(session, url)
    except TimeoutError:
        return "hung up"


async def refused(session: aiohttp.ClientSession, url: str) -> str:
    async with session.post(f"{url}/generate", json={"prompt": "x" * 5000, "n": []}) as response:
        await response.read()
        return _outcome(response.status, response.status == 400)


def _outcome(status: int, is_whole: bool) -> str:
    if status == 200:
        return "200" if is_whole else "lost in the midst"
    return str(status)


async def outcome_of(client: Client, session: aiohttp.ClientSession, url: str) -> str:
    """What the client says, or how the connection ended."""
    try:
        return await client(session, url)
    except aiohttp.ClientConnectorError:
        return "not connected"  # the server has ended
    except (aiohttp.ClientError, ConnectionError) as problem:
        return f"lost: {type(problem).__name__}"


# --- the two runs -----------------------------------------------------------------------------------------------------


async def storm(server: Server, requests: int, cancels: int, slow_ones: int) -> Storm:
    """All at once; the signal comes when half of those that the queue takes are left."""
    clients = [cancelled] * cancels + [slow] * slow_ones
    clients += [streamed if number % 2 else whole for number in range(requests - len(clients))]
    done: list[str] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=PATIENCE) as session:

        async def ask(client: Client) -> None:
            done.append(await outcome_of(client, session, server.url))

        asking = [asyncio.create_task(ask(client)) for client in clients]
        while len(done) < requests - 32:  # of 68 that have a place
            await asyncio.sleep(0.01)
        before = len(done)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*asking)
    return Storm(Counter(done), await asyncio.to_thread(server.process.wait, 120), before)


async def long_run(server: Server, requests: int) -> tuple[Memory, Counter[str]]:
    """All kinds of clients in turn, so many at once that there is always one waiting."""
    process, outcomes, early = psutil.Process(server.process.pid), Counter(), 0.0
    short, pieces = functools.partial(whole, ask=SHORT), functools.partial(streamed, ask=SHORT)
    kinds: list[Client] = [short, pieces, refused, functools.partial(cancelled, after_s=0.02), short]
    numbers = iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=PATIENCE) as session:

        async def work() -> None:
            nonlocal early
            for number in numbers:
                outcomes[await outcome_of(kinds[number % len(kinds)], session, server.url)] += 1
                if number == int(requests * WARM_UP):
                    early = process.memory_info().rss / 1e6

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return Memory(requests, early, process.memory_info().rss / 1e6), outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="of the long run (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with serving(Path(folder), *WORDS, batch_size=4) as server:
            first = asyncio.run(storm(server, STORM, CANCELS, SLOW))
        print(f"storm: {first.answered_before} of {STORM} had an outcome at SIGTERM; {_counts(first.outcomes)}")
        with serving(Path(folder), *WORDS, batch_size=4) as server:
            memory, outcomes = asyncio.run(long_run(server, arguments.requests))
    print(f"long run: {arguments.requests} requests; {_counts(outcomes)}")
    print(f"memory: {memory.early:.1f} MB after {WARM_UP:.0%} of them, {memory.late:.1f} MB at the end")
    problems = [problem for problem in (first.problem, memory.problem) if problem]
    print("; ".join(problems) or "holds")
    return 1 if problems else 0


def _counts(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(outcomes.items()))


if __name__ == "__main__":
    sys.exit(main())
