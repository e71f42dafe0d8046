"""The HTTP side: routes, access, and streaming as server-sent events.

    POST /generate   POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics

A request that ends early, because its client hangs up or its time limit is reached, frees its slots. Work whose time grows
with a request or its answers runs in a thread, so that the event loop stays free for /health and signals.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from dfactory.serving.answers import STOP, Answer, News, ProgressQueue
from dfactory.serving.bodies import Bodies
from dfactory.serving.connections import Connections
from dfactory.serving.engine import Engine, Job, Stopped
from dfactory.serving.metrics import Metrics
from dfactory.serving.reading import Readers, Refused
from dfactory.serving.refusals import EngineFailed, OutOfTime, error_responses, event_of, refusal
from dfactory.serving.requests import Generation, Read, Reader
from dfactory.serving.shapes import ChatCompletion, Completion, Native, Shape

OPEN_TO_ALL = ("/health",)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{0,5})?", re.IGNORECASE)
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
READ_WITHIN_S = 30.0  # for JSON, template and tokenizer, with the time in the queue before it


@dataclasses.dataclass(frozen=True)
class Service:
    """What the handlers need."""

    reader: Reader
    engine: Engine
    metrics: Metrics
    connections: Connections
    bodies: Bodies
    token: str | None
    request_timeout: float
    created: int
    readers: Readers = dataclasses.field(default_factory=Readers)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._measured, error_responses, self._allowed])
        name = self.reader.name
        app.router.add_post("/generate", self._answers(Reader.native, Native))
        app.router.add_post("/v1/completions", self._answers(Reader.completions, functools.partial(Completion, name)))
        app.router.add_post("/v1/chat/completions", self._answers(Reader.chat, functools.partial(ChatCompletion, name)))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    # --- before and after a handler ---------------------------------------------------------------------------------

    @web.middleware
    async def _measured(self, request: web.Request, handler) -> web.StreamResponse:
        with self.metrics.request(_route(request)) as result, self.connections.answering(request):
            response = await handler(request)
            result.status = response.status
            return response

    @web.middleware
    async def _allowed(self, request: web.Request, handler) -> web.StreamResponse:
        """Accept requests with the token. Without a token, accept only those that address this machine by its own name,
        which refuses a web page whose name was made to resolve to it (DNS rebinding)."""
        names = _names(request)
        if None in names:
            return refusal(400, f"Host {_host(request)} is not one name and a port", "invalid_request")
        if self.token is None:
            if not names or not names.issubset(LOCAL_NAMES):
                return refusal(
                    403, f"Host {_host(request)} is not this machine's own name: use 127.0.0.1", "wrong_host"
                )
        elif request.path not in OPEN_TO_ALL and not self._has_token(request):
            challenge = {"WWW-Authenticate": "Bearer"}
            return refusal(401, "Authorization: Bearer TOKEN is missing or wrong", "invalid_api_key", challenge)
        if request.method == "POST" and request.content_type != "application/json":
            return refusal(415, "Content-Type must be application/json", "invalid_request")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            return refusal(415, "Content-Encoding is not supported: send the body as it is", "invalid_request")
        return await handler(request)

    def _has_token(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        given = given.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self.token.encode()) and scheme.lower() == "bearer"

    # --- answers ----------------------------------------------------------------------------------------------------

    def _answers(self, read: Read, new_shape: Callable[[Generation], Shape]):
        async def handler(request: web.Request) -> web.StreamResponse:
            ends = asyncio.get_running_loop().time() + self.request_timeout
            async with self._in_time(ends), self.bodies.received(request) as raw:
                self.connections.has_all(request)
                generation = await self.readers.read(raw, functools.partial(read, self.reader), READ_WITHIN_S)
            answers = [Answer(self.reader.vocabulary, generation.stop, len(p)) for p in generation.prompts]
            shape = new_shape(generation)
            if generation.stream:
                return await self._stream(request, generation, answers, shape, ends)
            async with self._in_time(ends):
                async for _ in self._additions(generation, answers):
                    pass
            return web.json_response(text=await asyncio.to_thread(lambda: json.dumps(shape.whole(answers))))

        return handler

    @contextlib.asynccontextmanager
    async def _in_time(self, ends: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(ends):
                yield
        except TimeoutError as problem:
            raise OutOfTime(f"no answer within {self.request_timeout:g} s") from problem

    async def _additions(self, generation: Generation, answers: list[Answer]) -> AsyncIterator[tuple[int, str]]:
        """(index of an answer, the text that it gains), until all are complete. Raises QueueFull, Stopped, EngineFailed."""
        queue = ProgressQueue(len(answers), by_block=generation.stream or bool(generation.stop))
        jobs = [
            Job(prompt, generation.rules, noise_id, functools.partial(queue.report, index))
            for index, (prompt, noise_id) in enumerate(zip(generation.prompts, generation.noise_ids, strict=True))
        ]
        self.engine.submit(jobs)
        try:
            left = set(range(len(jobs)))
            while left:
                index, news = await queue.next()
                if index not in left:
                    continue  # decoded after a stop text
                added = await asyncio.to_thread(answers[index].add, self._checked(news))
                if answers[index].finish_reason is not None:
                    left.discard(index)
                    if answers[index].finish_reason == STOP:
                        self.engine.cancel([jobs[index]])
                if added or index not in left:
                    yield index, added
        finally:
            self.engine.cancel(jobs)

    def _checked(self, news: News | None) -> News:
        if news is not None:
            return news
        if self.engine.failed:
            raise EngineFailed
        raise Stopped("the server is shutting down")

    async def _stream(
        self, request: web.Request, generation: Generation, answers: list[Answer], shape: Shape, ends: float
    ) -> web.StreamResponse:
        """Stream the answers. An error before the first text has its own HTTP status; a later one is an event."""
        additions = self._additions(generation, answers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            async with self._in_time(ends):
                async for index, added in additions:
                    if not response.prepared:
                        await response.prepare(request)
                    for chunk in shape.chunks(index, answers[index], added):
                        await _send(response, chunk)
            last = shape.last(answers)
            if last is not None:
                await _send(response, last)
            await response.write(b"data: [DONE]\n\n")
        except (OutOfTime, EngineFailed, Stopped) as problem:
            if not response.prepared:
                raise
            await _send(response, event_of(problem))
        finally:
            await additions.aclose()
        await response.write_eof()
        return response

    # --- about the server -------------------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._about()]})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != self.reader.name:
            message = f"there is no model {name[:80]}: this server has {self.reader.name}"
            raise Refused(404, message, "model_not_found")
        return web.json_response(self._about())

    def _about(self) -> dict[str, Any]:
        about = {"id": self.reader.name, "object": "model", "created": self.created, "owned_by": "dfactory"}
        return about | {"max_model_len": self.reader.longest}

    async def _health(self, request: web.Request) -> web.Response:
        engine = self.engine
        state = "failed" if engine.failed else "draining" if engine.closed else "ok"
        return web.json_response({"status": state}, status=200 if state == "ok" else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": self.metrics.content_type})


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")


def _names(request: web.Request) -> set[str | None]:
    """The names by which a request addresses this server: its Host headers, and its target through aiohttp's `host`. None
    stands for one that is not a plain name."""
    hosts = request.headers.getall("Host", [])
    found = [HOST.fullmatch(host) for host in (*hosts, request.host)] if hosts else []
    return {host and host[1].lower() for host in found} | ({None} if len(hosts) > 1 else set())


def _host(request: web.Request) -> str:
    return ", ".join(request.headers.getall("Host", ["(none)"]))[:80]


def _route(request: web.Request) -> str:
    """The path as it was registered, because paths that clients invent must not become labels."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"
