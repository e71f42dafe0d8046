"""The HTTP side: routes, access, and streaming as server-sent events.

    POST /generate   POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics
    GET /   the page, whose requests are in live.py

A request that ends early, because its client hangs up or its time limit is reached, frees its slots. Work whose time grows
with a request or its answers runs in a thread, so that the event loop stays free for /health and signals.
"""

import asyncio
import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from dfactory.serving.access import Access
from dfactory.serving.answers import STOP, Answer, News, ProgressQueue
from dfactory.serving.engine import Engine, Job, Stopped
from dfactory.serving.live import Live, Model
from dfactory.serving.metrics import Metrics
from dfactory.serving.pages import Page
from dfactory.serving.reading import Refused
from dfactory.serving.receiving import Receiver, new_stream, send
from dfactory.serving.refusals import EngineFailed, OutOfTime, ending_of, error_responses, event_of
from dfactory.serving.requests import Generation, Read, Reader
from dfactory.serving.shapes import ChatCompletion, Completion, Native, Shape

OPEN_TO_ALL = frozenset({"/health"})


@dataclasses.dataclass(frozen=True)
class Service:
    """What the handlers need."""

    model: Model  # that the API answers with
    metrics: Metrics
    receiver: Receiver
    access: Access
    page: Page
    live: Live
    created: int

    @property
    def reader(self) -> Reader:
        return self.model.reader

    @property
    def engine(self) -> Engine:
        return self.model.engine

    @property
    def engines(self) -> list[Engine]:
        """Of all models."""
        return [model.engine for model in self.live.models.values()]

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._measured, error_responses, self.access.allowed])
        name = self.reader.name
        app.router.add_post("/generate", self._answers(Reader.native, Native))
        app.router.add_post("/v1/completions", self._answers(Reader.completions, functools.partial(Completion, name)))
        app.router.add_post("/v1/chat/completions", self._answers(Reader.chat, functools.partial(ChatCompletion, name)))
        self.page.add_to(app)
        self.live.add_to(app)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    # --- before and after a handler ---------------------------------------------------------------------------------

    @web.middleware
    async def _measured(self, request: web.Request, handler) -> web.StreamResponse:
        with self.metrics.request(_route(request)) as result, self.receiver.connections.answering(request):
            response = await handler(request)
            result.status = response.status
            return response

    # --- answers ----------------------------------------------------------------------------------------------------

    def _answers(self, read: Read, new_shape: Callable[[Generation], Shape]):
        async def handler(request: web.Request) -> web.StreamResponse:
            ends = self.receiver.end()
            generation = await self.receiver.read(request, functools.partial(read, self.reader), ends)
            answers = [Answer(self.reader.vocabulary, generation.stop, len(p)) for p in generation.prompts]
            shape = new_shape(generation)
            if generation.stream:
                return await self._stream(request, generation, answers, shape, ends)
            async with self.receiver.in_time(ends):
                async for _ in self._additions(generation, answers):
                    pass
            return web.json_response(text=await asyncio.to_thread(lambda: json.dumps(shape.whole(answers))))

        return handler

    async def _additions(self, generation: Generation, answers: list[Answer]) -> AsyncIterator[tuple[int, str]]:
        """(index of an answer, the text that it gains), until all are complete. Raises QueueFull, Stopped, EngineFailed."""
        queue = ProgressQueue(len(answers), by_block=generation.stream or bool(generation.stop))
        jobs = [
            Job(prompt, generation.rules, noise_id, functools.partial(queue.report, index), generation.draft)
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
        if news is None:
            raise ending_of(self.engine)
        return news

    async def _stream(
        self, request: web.Request, generation: Generation, answers: list[Answer], shape: Shape, ends: float
    ) -> web.StreamResponse:
        """Stream the answers. An error before the first text has its own HTTP status; a later one is an event."""
        additions = self._additions(generation, answers)
        response = new_stream()
        try:
            async with self.receiver.in_time(ends):
                async for index, added in additions:
                    for chunk in shape.chunks(index, answers[index], added):
                        await send(request, response, chunk)
            last = shape.last(answers)
            if last is not None:
                await send(request, response, last)
            await send(request, response, "[DONE]")
        except (OutOfTime, EngineFailed, Stopped) as problem:
            if not response.prepared:
                raise
            await send(request, response, event_of(problem))
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
        engines = self.engines
        failed, closed = (any(getattr(engine, what) for engine in engines) for what in ("failed", "closed"))
        state = "failed" if failed else "draining" if closed else "ok"
        return web.json_response({"status": state}, status=200 if state == "ok" else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": self.metrics.content_type})


def _route(request: web.Request) -> str:
    """The path as it was registered, because paths that clients invent must not become labels."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"
