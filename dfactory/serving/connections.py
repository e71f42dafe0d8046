"""Limits how long a client may keep a connection waiting, and how many there are. aiohttp itself has no such limits.

A connection waits for its client from its start, and after each answer, until a request with its body has arrived. During
that time it may be closed: if the client takes too long, or to make room for a newer connection. While an answer is
written, the client must read at least SLOWEST bytes a second.
"""

import asyncio
import contextlib
import resource
from collections.abc import Callable, Iterator

from aiohttp import web

MOST_CONNECTIONS = 1024
FILES_BESIDE = 128  # other files that the process has open
SLOWEST = 1024  # bytes a second
IDLE_S = 75.0  # between two requests
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Connections:
    """All open connections. `protocols(server)` is the protocol factory for asyncio."""

    def __init__(self, client_timeout: float):
        self.client_timeout = client_timeout
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = MOST_CONNECTIONS if files < 0 else min(MOST_CONNECTIONS, max(16, files - FILES_BESIDE))
        self.open: dict[web.RequestHandler, Connection] = {}

    def protocols(self, server: web.Server) -> Callable[[], asyncio.Protocol]:
        return lambda: Connection(self, server())

    def has_all(self, request: web.Request) -> None:
        """Mark the request as complete: from now on the client waits for the server."""
        if (connection := self.open.get(request.protocol)) is not None:  # else it is already closed
            connection.has_all()

    @contextlib.contextmanager
    def answering(self, request: web.Request) -> Iterator[None]:
        """A context from the end of a request's headers, whose body has its own time limit, to the answer. On exit the
        answer is written or about to be, and the connection waits for the next request."""
        if (connection := self.open.get(request.protocol)) is not None:
            connection.has_head()
        try:
            yield
        finally:
            if (connection := self.open.get(request.protocol)) is not None:
                connection.has_answered()

    def make_room(self) -> bool:
        """If there are too many connections, close the one that has kept the server waiting longest. Returns whether there
        is room."""
        if len(self.open) < self.most:
            return True
        waiting = [connection for connection in self.open.values() if connection.is_idle]
        if not waiting:
            return False
        min(waiting, key=lambda connection: connection.waits_since).abort()
        return True

    def close_waiting(self) -> None:
        """Close idle connections when the server ends; answers that are being written continue."""
        for connection in list(self.open.values()):
            if connection.is_idle:
                connection.transport.close()

    async def all_closed(self, timeout_s: float) -> None:
        """Wait until all answers are sent, at most `timeout_s`; then abort the remaining connections."""
        ends = asyncio.get_running_loop().time() + timeout_s
        while self.open and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(0.02)
        for connection in list(self.open.values()):
            connection.abort()


class Connection(asyncio.Protocol):
    """aiohttp's protocol with a time limit."""

    def __init__(self, connections: Connections, inner: web.RequestHandler):
        self.connections, self.inner = connections, inner
        self.loop = asyncio.get_running_loop()
        self.waits_since: float | None = self.loop.time()
        self.said_something = False  # whether the client has sent anything since the connection waits
        self.unsent = 0  # bytes in the buffer when the clock was set
        self._clock: asyncio.TimerHandle | None = None

    # --- from asyncio -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        if not self.connections.make_room():
            transport.write(FULL)
            transport.close()
            self.inner = None
            return
        self.connections.open[self.inner] = self
        self._set_clock(self.connections.client_timeout)
        self.inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self.inner is None:
            return
        if self.waits_since is not None and not self.said_something:
            self.said_something = True
            self._set_clock(self.connections.client_timeout)
        self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self.inner.eof_received() if self.inner is not None else None

    def pause_writing(self) -> None:
        if self.inner is not None:
            self._set_clock(self.connections.client_timeout)
            self.inner.pause_writing()

    def resume_writing(self) -> None:
        if self.inner is not None:
            if self.waits_since is None:
                self._stop_clock()
            self.inner.resume_writing()

    def connection_lost(self, problem: Exception | None) -> None:
        self._stop_clock()
        if self.inner is not None:
            self.connections.open.pop(self.inner, None)
            self.inner.connection_lost(problem)

    @property
    def is_idle(self) -> bool:
        """Whether it waits for its client and its last answer is sent."""
        return self.waits_since is not None and not self.transport.get_write_buffer_size()

    # --- from the handlers ------------------------------------------------------------------------------------------

    def has_head(self) -> None:
        self._stop_clock()

    def has_all(self) -> None:
        self.waits_since = None

    def has_answered(self) -> None:
        self.waits_since, self.said_something = self.loop.time(), False
        self._set_clock(IDLE_S)

    def abort(self) -> None:
        self.waits_since = None  # not chosen twice
        self.transport.abort()

    # --- the clock --------------------------------------------------------------------------------------------------

    def _set_clock(self, seconds: float) -> None:
        self._stop_clock()
        self.unsent = self.transport.get_write_buffer_size()
        self._clock = self.loop.call_later(seconds, self._time_is_over, seconds)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _time_is_over(self, seconds: float) -> None:
        taken = self.unsent - self.transport.get_write_buffer_size()
        if taken >= SLOWEST * seconds:
            self._set_clock(seconds)
        else:
            self.abort()
