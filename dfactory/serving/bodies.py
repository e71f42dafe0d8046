"""Receives bodies: bounded one by one and together, within the time that a client has."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

from dfactory.errors import DFactoryError
from dfactory.serving.bounds import LARGEST_BODY

SMALL = 2**16  # bytes of a body that are always taken
MOST_BYTES = 64 * 2**20  # of all bodies that are being received or wait to be read, beyond the small ones


class SlowClient(DFactoryError):
    """A body that did not come within the time that a client has."""


class TooManyBytes(DFactoryError):
    """Bodies fill the memory that is meant for them."""


class Bodies:
    """The bodies that are here."""

    def __init__(self, client_timeout: float):
        self.client_timeout = client_timeout
        self.held = 0  # bytes beyond SMALL of each

    @contextlib.asynccontextmanager
    async def received(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts until the end of the context. Raises HTTPRequestEntityTooLarge, SlowClient
        or TooManyBytes."""
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
            raise SlowClient(f"the body did not come within {self.client_timeout:g} s") from problem
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
