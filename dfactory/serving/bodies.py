"""Receives request bodies: each one and all together bounded in size, and each within the client's time limit."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

from dfactory.errors import DFactoryError
from dfactory.serving.bounds import LARGEST_BODY

SMALL = 2**16  # the first bytes of a body, which are always accepted
MOST_BYTES = 64 * 2**20  # of all bodies that are being received or wait to be parsed, beyond SMALL of each


class SlowClient(DFactoryError):
    """A body that did not arrive within the client's time limit."""


class TooManyBytes(DFactoryError):
    """The bodies in memory have reached MOST_BYTES."""


class Bodies:
    """The bodies in memory."""

    def __init__(self, client_timeout: float):
        self.client_timeout = client_timeout
        self.held = 0  # bytes beyond SMALL of each

    @contextlib.asynccontextmanager
    async def received(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body of a request; it counts towards MOST_BYTES until the end of the context. Raises
        HTTPRequestEntityTooLarge, SlowClient or TooManyBytes."""
        announced = request.content_length or 0
        if announced > LARGEST_BODY:
            raise web.HTTPRequestEntityTooLarge(LARGEST_BODY, announced)
        body = _Body(self)
        try:
            async with asyncio.timeout(self.client_timeout) as clock:
                async for chunk in request.content.iter_any():
                    body.add(chunk)
            yield bytes(body.data)
        except TimeoutError as problem:
            if not clock.expired():
                raise
            raise SlowClient(f"the body did not arrive within {self.client_timeout:g} s") from problem
        finally:
            body.close()


class _Body:
    def __init__(self, bodies: Bodies):
        self.bodies, self.data, self.counted = bodies, bytearray(), 0

    def add(self, chunk: bytes) -> None:
        if len(self.data) + len(chunk) > LARGEST_BODY:
            raise web.HTTPRequestEntityTooLarge(LARGEST_BODY, len(self.data) + len(chunk))
        self.data += chunk
        more = max(0, len(self.data) - SMALL) - self.counted
        self.counted += more
        self.bodies.held += more
        if self.bodies.held > MOST_BYTES:
            raise TooManyBytes("many long requests are being received: try again")

    def close(self) -> None:
        self.bodies.held -= self.counted
        self.counted = 0
