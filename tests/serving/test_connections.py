"""Clients that keep a server waiting, in one event loop with it: no model, an application that answers at once or never."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from dfactory.errors import DataError
from dfactory.serving import bodies, connections
from dfactory.serving.bodies import Bodies, TooManyBytes
from dfactory.serving.connections import Connections
from dfactory.serving.reading import Readers, ReadingFailed, Refused, TooSlow

HEALTH = b"GET /now HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = 4 * 2**20


@contextlib.asynccontextmanager
async def listening(clients: Connections) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """(port, what lets /never answer); /large is a body of LARGE bytes."""
    release = asyncio.Event()

    @web.middleware
    async def clocked(request, handler):
        with clients.answering(request):
            return await handler(request)

    async def never(request):
        clients.has_all(request)
        await release.wait()
        return web.Response(text="at last")

    async def now(request):
        return web.Response(text="now")

    async def large(request):
        return web.Response(body=bytes(LARGE))

    app = web.Application(middlewares=[clocked])
    app.router.add_routes([web.get("/never", never), web.get("/now", now), web.get("/large", large)])
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    server = await asyncio.get_running_loop().create_server(clients.protocols(runner.server), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], release
    finally:
        server.close()
        await runner.cleanup()


async def ask(port: int, text: bytes = HEALTH):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text)
    return reader, writer


async def first_line(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(20):
        return await reader.readline()


def test_the_one_that_waits_longest_makes_room():
    async def run():
        clients = Connections(client_timeout=60)
        clients.most = 2
        async with listening(clients) as (port, release):
            oldest = await ask(port, b"GET /now HT")
            busy = await ask(port, HEALTH.replace(b"now", b"never"))
            while len(clients.open) < 2 or all(one.waits_since for one in clients.open.values()):
                await asyncio.sleep(0.01)
            newest = await ask(port)
            assert b"200 OK" in await first_line(newest[0])
            assert await first_line(oldest[0]) == b""  # cut
            second = await ask(port, HEALTH.replace(b"now", b"never"))
            while sum(one.waits_since is None for one in clients.open.values()) < 2:
                await asyncio.sleep(0.01)
            refused = await ask(port)
            assert b"503" in await first_line(refused[0])  # both are being answered: neither is given up
            release.set()
            assert [b"200 OK" in await first_line(one[0]) for one in (busy, second)] == [True, True]

    asyncio.run(run())


def test_who_says_nothing_is_cut_and_who_is_answered_is_not(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_S", 0.3)

    async def run():
        async with listening(Connections(client_timeout=0.3)) as (port, release):
            silent, half = await ask(port, b""), await ask(port, HEALTH[:-2])
            busy = await ask(port, HEALTH.replace(b"now", b"never"))
            assert [await first_line(silent[0]), await first_line(half[0])] == [b"", b""]
            await asyncio.sleep(0.3)
            release.set()
            async with asyncio.timeout(20):
                assert (await busy[0].read()).endswith(b"at last")  # and cut, as it says no more

    asyncio.run(run())


def test_who_does_not_read_is_cut_and_who_reads_slowly_is_not():
    async def run():
        clients = Connections(client_timeout=0.5)
        async with listening(clients) as (port, _):
            await ask(port, HEALTH.replace(b"now", b"large"))
            async with asyncio.timeout(20):
                while not clients.open:
                    await asyncio.sleep(0.01)
                while clients.open:
                    await asyncio.sleep(0.01)
            reader, _ = await ask(port, HEALTH.replace(b"now", b"large"))
            got = 0
            while got < LARGE:  # 4 MB in pieces of 200 KB: about 2 s
                got += len(await reader.readexactly(min(200_000, LARGE - got)))
                await asyncio.sleep(0.1)

    asyncio.run(run())


def test_bodies_are_bounded_together(monkeypatch):
    """Of three bodies of 100 KB the third has no place; what is small always has one."""
    monkeypatch.setattr(bodies, "MOST_BYTES", 80_000)
    held = Bodies(client_timeout=1)
    first, second, third, small = (bodies._Body(held) for _ in range(4))
    first.add(bytes(100_000))
    second.add(bytes(100_000))
    with pytest.raises(TooManyBytes):
        third.add(bytes(100_000))
    third.close()
    small.add(bytes(65_000))
    first.close()
    second.close()
    assert held.held == 0


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_smallest_is_read_first_and_nobody_waits_for_one_that_hangs():
    order, hang = [], asyncio.Event()

    def read(raw: bytes) -> str:
        order.append(len(raw))
        if raw == b"hang":
            while not hang.is_set():
                pass
        return raw.decode()

    async def run():
        readers = Readers()
        stuck = asyncio.create_task(readers.read(b"hang", read, 0.5))
        await asyncio.sleep(0.1)
        others = [asyncio.create_task(readers.read(b"x" * size, read, 20)) for size in (30, 10, 20)]
        with pytest.raises(TooSlow, match=r"not read within 0\.5 s"):
            await stuck
        assert [len(text) for text in await asyncio.gather(*others)] == [30, 10, 20]
        hang.set()

    asyncio.run(run())
    assert order == [4, 10, 20, 30]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_wrong_with_a_body_and_with_its_reader():
    def wrong(raw: bytes):
        raise DataError("no " + "x" * 10_000)

    def bug(raw: bytes):
        raise KeyError("bug")

    async def run():
        readers = Readers()
        with pytest.raises(Refused) as refused:
            await readers.read(b"", wrong, 20)
        assert (refused.value.status, len(refused.value.message)) == (400, 2000)
        with pytest.raises(ReadingFailed):
            await readers.read(b"", bug, 20)
        assert await readers.read(b"x", bytes.decode, 20) == "x"
        while any(thread.name == "reading" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)

    asyncio.run(run())
