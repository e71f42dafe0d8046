"""An answer while it is denoised, forward by forward: what the page shows, and any other client may.

    POST /denoise         a body of /generate; an event for each forward, the last one with the answer and its history
    POST /denoise/ID      other decode keys for an answer that is running
    GET  /about           models, decode keys and rules, as a form needs them

    {"id": "...", "model": "mine", "prompt_tokens": 9, "block_size": 32, "seed": 5, "given": [0, 1, 4]}
    {"forward": 1, "tokens": 2, "seconds": 0.02, "rule": "threshold 0.9", "cells": [[0, "fresh", "The", 0.97], ...]}
    {"forward": 7, ..., "done": {"text": "The cat", "finish_reason": "eos", ..., "history": {"step": [0, 0, 3], ...}}}

A cell is a token's position in the answer, its state, its text and its probability; an event has the cells that changed.
"""

import asyncio
import dataclasses
import functools
import math
import secrets
import threading
import time
from collections import deque
from typing import Any, NamedTuple

from aiohttp import web

from dfactory.decoding import Progress
from dfactory.denoising import Denoising, State
from dfactory.serving.about import about
from dfactory.serving.engine import Engine, Job, Stopped
from dfactory.serving.pieces import Pieces
from dfactory.serving.reading import Refused
from dfactory.serving.receiving import Receiver, new_stream, send
from dfactory.serving.refusals import EngineFailed, OutOfTime, ending_of, event_of
from dfactory.serving.requests import Generation, Reader
from dfactory.types import Rollout

MOST_PENDING = 64  # forwards that wait for a slow client; of more, it misses some
DIGITS = 3  # of a probability
GIVEN = "given"  # the state of a template's text, beside those of denoising.py


class Model(NamedTuple):
    """A checkpoint that is served."""

    reader: Reader
    engine: Engine


class Step(NamedTuple):
    progress: Progress
    rule: str
    seconds: float  # since its first forward began


class Steps:
    """Carries the forwards of an answer from the decoder's thread to the event loop. A client that reads slowly misses
    forwards, never the last one."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.pending: deque[Step | None] = deque()
        self.lock, self.ready = threading.Lock(), asyncio.Event()
        self.job: Job | None = None

    def report(self, progress: Progress | None) -> None:
        """Call it from any thread; None means that the answer will not be completed."""
        step = progress and Step(progress, self.job.rules.rule.shown, time.monotonic() - self.job.started)
        with self.lock:
            if len(self.pending) >= MOST_PENDING:
                self.pending.pop()
            self.pending.append(step)
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.ready.set)

    async def next(self) -> Step | None:
        while True:
            with self.lock:
                if self.pending:
                    return self.pending.popleft()
                self.ready.clear()
            await self.ready.wait()


class Cells:
    """The events of one answer, from its progress in order."""

    def __init__(self, reader: Reader, generation: Generation):
        self.vocabulary, self.generation = reader.vocabulary, generation
        self.mask = self.vocabulary.special.mask
        self.given = {place for place, token in enumerate(generation.draft) if token != self.mask}
        self.pieces = Pieces(self.vocabulary)
        self.denoising = Denoising(self.vocabulary, generation.rules.block_size)
        self.shown: list[tuple] = []

    def event(self, step: Step) -> dict[str, Any]:
        progress = step.progress
        cells = self._cells(progress)
        changed = [(place, *cell) for place, cell in enumerate(cells) if cell != self._before(place)]
        self.shown = cells
        event = {
            "forward": progress.forwards,
            "tokens": sum(token != self.mask for token in progress.token_ids),
            "seconds": round(step.seconds, 4),
            "rule": step.rule,
            "length": len(cells),
            "cells": changed,
        }
        return event if progress.rollout is None else event | {"done": self._done(progress.rollout)}

    def _before(self, place: int) -> tuple | None:
        return self.shown[place] if place < len(self.shown) else None

    def _cells(self, progress: Progress) -> list[tuple[str, str, float]]:
        states = self.denoising.states(progress)
        shown = [
            token if state != State.MASKED else None for token, state in zip(progress.draft_ids, states, strict=True)
        ]
        cells = []
        for place, (text, state) in enumerate(zip(self.pieces.texts(shown), states, strict=True)):
            name = GIVEN if place in self.given else state.value
            cells.append((name, text, self._probability(progress, place)))
        if progress.rollout is None and progress.settled == len(cells):
            cells += [(State.MASKED.value, "", 0.0)] * self.generation.rules.block_size  # the next block
        return cells

    def _probability(self, progress: Progress, place: int) -> float:
        """Of the token, or of what would take the place of a mask; 0 where a forward has not been there."""
        if progress.draft_ids[place] == self.mask:
            return 0.0
        is_mask = progress.token_ids[place] == self.mask
        return round(math.exp((progress.draft_logprobs if is_mask else progress.logprobs)[place]), DIGITS)

    def _done(self, rollout: Rollout) -> dict[str, Any]:
        written = self.pieces.alone
        return {
            "text": self.vocabulary.text(rollout.output_ids),
            "finish_reason": rollout.finish_reason.value,
            "prompt_tokens": len(rollout.prompt_ids),
            "output_tokens": len(rollout.output_ids),
            "forwards": rollout.forwards,
            "tokens_per_forward": rollout.tokens_per_forward,
            "seed": self.generation.rules.seed,
            "history": {
                "ids": rollout.token_ids,
                "first": rollout.first_commit_step,
                "step": rollout.commit_step,
                "edits": [[at, step, written(old), written(new)] for at, step, old, new in rollout.edits],
            },
        }


@dataclasses.dataclass
class Live:
    """The handlers. `models` are by name; the first one answers where a request names none."""

    models: dict[str, Model]
    receiver: Receiver
    running: dict[str, tuple[Model, Job]] = dataclasses.field(default_factory=dict)

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/about", self._about)
        app.router.add_post("/denoise", self._denoise)
        app.router.add_post("/denoise/{id}", self._change)

    async def _about(self, request: web.Request) -> web.Response:
        return web.json_response(about([model.reader for model in self.models.values()]))

    def _model(self, request: web.Request) -> Model:
        name = request.query.get("model", next(iter(self.models)))
        if name not in self.models:
            raise Refused(404, f"there is no model {name[:80]}: known are {', '.join(self.models)}", "model_not_found")
        return self.models[name]

    async def _denoise(self, request: web.Request) -> web.StreamResponse:
        ends, model = self.receiver.end(), self._model(request)
        generation = await self.receiver.read(request, functools.partial(Reader.native, model.reader), ends)
        steps, name = Steps(), secrets.token_urlsafe(12)
        steps.job = Job(generation.prompts[0], generation.rules, 0, steps.report, generation.draft)
        model.engine.submit([steps.job])
        self.running[name] = model, steps.job
        response = new_stream()
        try:
            await send(request, response, _opening(name, model, generation))
            async with self.receiver.in_time(ends):
                await self._show(request, response, Cells(model.reader, generation), steps, model.engine)
        except (OutOfTime, EngineFailed, Stopped) as problem:
            await send(request, response, event_of(problem))
        finally:
            del self.running[name]
            model.engine.cancel([steps.job])
        await response.write_eof()
        return response

    async def _show(self, request, response, cells: Cells, steps: Steps, engine: Engine) -> None:
        while (step := await steps.next()) is not None:
            await send(request, response, await asyncio.to_thread(cells.event, step))
            if step.progress.rollout is not None:
                return
        raise ending_of(engine)

    async def _change(self, request: web.Request) -> web.Response:
        if (found := self.running.get(request.match_info["id"])) is None:
            raise Refused(404, "this answer is not running: it is complete, or there was none", "not_running")
        model, job = found
        read = functools.partial(model.reader.change, before=job.rules, draft=job.draft)
        rules = await self.receiver.read(request, read, self.receiver.end())
        model.engine.change_rules(job, rules)
        return web.json_response({"rule": rules.rule.shown})


def _opening(name: str, model: Model, generation: Generation) -> dict[str, Any]:
    mask = model.reader.vocabulary.special.mask
    return {
        "id": name,
        "model": model.reader.name,
        "prompt_tokens": len(generation.prompts[0]),
        "block_size": generation.rules.block_size,
        "max_new_tokens": generation.rules.max_new_tokens,
        "seed": generation.rules.seed,
        "given": [place for place, token in enumerate(generation.draft) if token != mask],
    }
