"""The HTTP side: routes, who may ask, what goes wrong, and streaming as server-sent events.

    POST /generate   POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics

A request that ends early, because its client hangs up or its time is over, gives its slots back.
"""

import asyncio
import dataclasses
import functools
import hmac
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from dfactory.decoding import Progress
from dfactory.errors import ConfigError, DataError
from dfactory.serving.answers import STOP, Answer
from dfactory.serving.engine import Engine, Job, QueueFull, Stopped
from dfactory.serving.metrics import Metrics
from dfactory.serving.requests import Generation, Read, Reader, UnknownModel
from dfactory.serving.shapes import ChatCompletion, Completion, Native, Shape, error

LARGEST_BODY = 8 * 2**20
OPEN_TO_ALL = ("/health",)
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


class EngineFailed(Exception):
    """The engine's thread ended under a request."""


@dataclasses.dataclass(frozen=True)
class Service:
    """What the handlers need."""

    reader: Reader
    engine: Engine
    metrics: Metrics
    token: str | None
    request_timeout: float
    created: int

    def app(self) -> web.Application:
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[self._measured, self._told, self._allowed])
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
        with self.metrics.request(_route(request)) as result:
            response = await handler(request)
            result.status = response.status
            return response

    @web.middleware
    async def _told(self, request: web.Request, handler) -> web.StreamResponse:
        """Failures that are expected, in OpenAI's shape. Any other is a bug: aiohttp logs it and says 500."""
        try:
            return await handler(request)
        except UnknownModel as problem:
            return _refusal(404, str(problem), "model_not_found")
        except (DataError, ConfigError) as problem:
            return _refusal(400, str(problem), "invalid_request")
        except QueueFull as problem:
            return _refusal(429, str(problem), "queue_full", {"Retry-After": str(problem.retry_after)})
        except Stopped as problem:
            return _refusal(503, str(problem), "shutting_down", {"Retry-After": "5"})
        except EngineFailed:
            return _refusal(500, "the decoder has failed; see the server's log", "decoder_failed")
        except TimeoutError:
            return _refusal(504, f"no answer within {self.request_timeout:g} s", "timeout")
        except web.HTTPException as problem:
            if problem.status < 400:
                raise
            return _refusal(problem.status, problem.reason, "invalid_request", _kept_headers(problem))

    @web.middleware
    async def _allowed(self, request: web.Request, handler) -> web.StreamResponse:
        """Who has the token; without one, only what addresses this machine by its own name, so that a web page whose
        name was made to point here (DNS rebinding) is turned away."""
        if self.token is None:
            host = request.headers.get("Host", "")
            if host.rpartition(":")[0] not in LOCAL_NAMES and host not in LOCAL_NAMES:
                return _refusal(403, f"Host {host[:80]} is not this machine's own name: use 127.0.0.1", "wrong_host")
        elif request.path not in OPEN_TO_ALL and not self._has_token(request):
            challenge = {"WWW-Authenticate": "Bearer"}
            return _refusal(401, "Authorization: Bearer TOKEN is missing or wrong", "invalid_api_key", challenge)
        if request.method == "POST" and request.content_type != "application/json":
            return _refusal(415, "Content-Type must be application/json", "invalid_request")
        return await handler(request)

    def _has_token(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        given = given.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self.token.encode()) and scheme.lower() == "bearer"

    # --- answers ----------------------------------------------------------------------------------------------------

    def _answers(self, read: Read, new_shape: Callable[[Generation], Shape]):
        async def handler(request: web.Request) -> web.StreamResponse:
            generation = read(self.reader, await request.read())
            answers = [Answer(self.reader.vocabulary, generation.stop, len(p)) for p in generation.prompts]
            shape = new_shape(generation)
            if generation.stream:
                return await self._stream(request, generation, answers, shape)
            async with asyncio.timeout(self.request_timeout):
                async for _ in self._additions(generation, answers):
                    pass
            return web.json_response(shape.whole(answers))

        return handler

    async def _additions(self, generation: Generation, answers: list[Answer]) -> AsyncIterator[tuple[int, str]]:
        """(which answer, the text that it gains), until all are complete. Raises QueueFull, Stopped, EngineFailed."""
        heard: asyncio.Queue[tuple[int, Progress | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(index: int, progress: Progress | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(heard.put_nowait, (index, progress))

        jobs = [
            Job(prompt, generation.rules, noise_id, functools.partial(hear, index))
            for index, (prompt, noise_id) in enumerate(zip(generation.prompts, generation.noise_ids, strict=True))
        ]
        self.engine.submit(jobs)
        try:
            left = set(range(len(jobs)))
            while left:
                index, progress = await heard.get()
                if progress is None:
                    raise EngineFailed
                if index not in left:
                    continue  # what was decoded behind a stop text
                added = answers[index].hear(progress)
                if answers[index].finish_reason is not None:
                    left.discard(index)
                    if answers[index].finish_reason == STOP:
                        self.engine.cancel([jobs[index]])
                if added or index not in left:
                    yield index, added
        finally:
            self.engine.cancel(jobs)

    async def _stream(
        self, request: web.Request, generation: Generation, answers: list[Answer], shape: Shape
    ) -> web.StreamResponse:
        """Refusals that come before the first text have a status of their own; later ones are an event."""
        additions = self._additions(generation, answers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            async with asyncio.timeout(self.request_timeout):
                async for index, added in additions:
                    if not response.prepared:
                        await response.prepare(request)
                    for chunk in shape.chunks(index, answers[index], added):
                        await _send(response, chunk)
            last = shape.last(answers)
            if last is not None:
                await _send(response, last)
            await response.write(b"data: [DONE]\n\n")
        except (TimeoutError, EngineFailed) as problem:
            if not response.prepared:
                raise
            what = (
                ("decoder has failed", "decoder_failed")
                if isinstance(problem, EngineFailed)
                else ("time is over", "timeout")
            )
            await _send(response, error(what[0], "server_error", what[1]))
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
            raise UnknownModel(f"model {name[:80]} is not here: this server has {self.reader.name}")
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


def _route(request: web.Request) -> str:
    """The path as it was registered: what clients make up may not become a label."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


def _refusal(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> web.Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return web.json_response(error(message, kind, code), status=status, headers=headers)


def _kept_headers(problem: web.HTTPException) -> dict[str, str]:
    return {"Allow": problem.headers["Allow"]} if "Allow" in problem.headers else {}
