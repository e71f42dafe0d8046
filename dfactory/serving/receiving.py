"""Takes in the body of a request within its time, and sends the events of an answer."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from dfactory.serving.bodies import Bodies
from dfactory.serving.connections import Connections
from dfactory.serving.reading import Readers
from dfactory.serving.refusals import OutOfTime

READ_WITHIN_S = 30.0  # for JSON, template and tokenizer, with the time in the queue before it


@dataclasses.dataclass(frozen=True)
class Receiver:
    connections: Connections
    bodies: Bodies
    request_timeout: float
    readers: Readers = dataclasses.field(default_factory=Readers)

    def end(self) -> float:
        """The time of the event loop at which an answer that is asked for now has to be complete."""
        return asyncio.get_running_loop().time() + self.request_timeout

    @contextlib.asynccontextmanager
    async def in_time(self, ends: float) -> AsyncIterator[None]:
        """Raises OutOfTime where what stands in it takes longer."""
        try:
            async with asyncio.timeout_at(ends):
                yield
        except TimeoutError as problem:
            raise OutOfTime(f"no answer within {self.request_timeout:g} s") from problem

    async def read(self, request: web.Request, read: Callable[[bytes], Any], ends: float) -> Any:
        """What `read` makes of the body, in a thread. Raises as Bodies.received, Readers.read and `in_time`."""
        async with self.in_time(ends), self.bodies.received(request) as raw:
            self.connections.has_all(request)
            return await self.readers.read(raw, read, READ_WITHIN_S)


def new_stream() -> web.StreamResponse:
    """A response of server-sent events; it begins with the first `send`."""
    return web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})


async def send(request: web.Request, response: web.StreamResponse, event: dict[str, Any] | str) -> None:
    if not response.prepared:
        await response.prepare(request)
    data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    await response.write(b"data: " + data.encode(errors="replace") + b"\n\n")
