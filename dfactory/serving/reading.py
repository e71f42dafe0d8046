"""Reads requests outside the event loop, because the time of JSON, template and tokenizer grows with their input.

One at a time, because Python runs one thread at a time; the smallest body first, so that long prompts delay only long
prompts. A thread cannot be stopped: a late one is abandoned and the next one starts.
"""

import asyncio
import contextlib
import heapq
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from dfactory.errors import ConfigError, DataError, DFactoryError
from dfactory.serving.bounds import MESSAGE_CHARACTERS
from dfactory.serving.requests import UnknownModel

Outcome = Any  # what was read, or an exception


class Refused(Exception):
    """An invalid request, with the response for its client."""

    def __init__(self, status: int, message: str, code: str):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class TooSlow(DFactoryError):
    """A request that was not read in time, because others were before it or because it is very long."""


class ReadingFailed(Exception):
    """The thread ended with an unexpected exception. Its traceback is in the log."""


class Readers:
    """Decides which request is read next."""

    def __init__(self):
        self._waiting: list[tuple[int, int, asyncio.Future]] = []
        self._numbers = itertools.count()
        self._busy = False

    async def read(self, raw: bytes, read: Callable[[bytes], Any], timeout_s: float) -> Any:
        """The result of `read` for a body. Raises Refused, ReadingFailed, and TooSlow after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._turn(len(raw)):
                outcome = await _in_thread(raw, read)
        except TimeoutError as problem:
            raise TooSlow(
                f"the request was not read within {timeout_s:g} s: send a shorter one, or try again later"
            ) from problem
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @contextlib.asynccontextmanager
    async def _turn(self, size: int) -> AsyncIterator[None]:
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (size, next(self._numbers), turn))
        self._call_next()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self._busy = False
            self._call_next()

    def _call_next(self) -> None:
        while self._waiting and not self._busy:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.cancelled():
                turn.set_result(None)
                self._busy = True


def _in_thread(raw: bytes, read: Callable[[bytes], Any]) -> "asyncio.Future[Outcome]":
    """Run `read` in a daemon thread, so that a server that ends does not wait for it."""
    loop = asyncio.get_running_loop()
    result = loop.create_future()

    def run() -> None:
        outcome: Outcome = ReadingFailed()
        try:
            outcome = read(raw)
        except UnknownModel as problem:
            outcome = _refused(404, problem, "model_not_found")
        except (DataError, ConfigError) as problem:
            outcome = _refused(400, problem, "invalid_request")
        finally:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, result, outcome)

    threading.Thread(target=run, name="reading", daemon=True).start()
    return result


def _refused(status: int, problem: DFactoryError, code: str) -> Refused:
    return Refused(status, str(problem)[:MESSAGE_CHARACTERS], code)


def _settle(result: asyncio.Future, outcome: Outcome) -> None:
    if not result.done():
        result.set_result(outcome)
