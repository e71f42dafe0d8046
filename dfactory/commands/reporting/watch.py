"""`dfactory report --watch`: a page of runs, whose curves and completions appear as they are written.

    GET /   the page              GET /runs          the runs, as server-sent events
    GET /run?name=   one of them   GET /completions   its rollouts, filtered   GET /picture   a drawing

It only reads. Who may ask is decided as for `dfactory serve`.
"""

import asyncio
import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

from dfactory.commands.reporting.live import ORDERS, PICTURES, Filter, WatchedRun, completions, run_folders
from dfactory.console import plain_console
from dfactory.errors import ConfigError, DataError
from dfactory.serving.access import Access
from dfactory.serving.pages import HEADERS, Page
from dfactory.serving.reading import Refused
from dfactory.serving.receiving import new_stream, send
from dfactory.serving.refusals import error_responses
from dfactory.serving.server import read_token, url_of

LOOK_S = 2.0  # between two looks at the folders
CLEANUP_S = 2.0


class Options(NamedTuple):
    host: str
    port: int
    token_file: str | None


def watch(given: list[Path], options: Options) -> int:
    """Serve until SIGTERM or SIGINT; returns 0. Raises DataError for a folder that does not exist."""
    token = read_token(options.host, options.token_file)
    if missing := [path for path in given if not path.is_dir()]:
        raise DataError(f"{missing[0]} does not exist: give run folders, or a folder with run folders in it")
    return asyncio.run(_serve(Watcher(given), token, options))


async def _serve(watcher: "Watcher", token: str | None, options: Options) -> int:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    page = Page("runs")
    app = web.Application(middlewares=[error_responses, Access(token, page.paths).allowed])
    page.add_to(app)
    watcher.add_to(app)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=CLEANUP_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port)
        try:
            await site.start()
        except OSError as problem:
            raise ConfigError(f"cannot listen on {options.host} port {options.port}: {problem.strerror}") from problem
        address = site._server.sockets[0].getsockname()[:2]
        plain_console(stderr=True).print(f"runs on {url_of(address)}", soft_wrap=True)
        looking = asyncio.create_task(watcher.look())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((looking, stopped), return_when=asyncio.FIRST_COMPLETED)
        if looking.done():
            looking.result()  # which raises
        looking.cancel()
    finally:
        watcher.end()
        await runner.cleanup()
    return 0


@dataclasses.dataclass
class Watcher:
    """The runs below the given folders, looked at every LOOK_S."""

    given: list[Path]
    runs: dict[str, WatchedRun] = dataclasses.field(default_factory=dict)
    seen: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    number: int = 0  # of changes
    ended: bool = False

    def __post_init__(self):
        self.changed = asyncio.Condition()

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/runs", self._runs)
        app.router.add_get("/run", self._run)
        app.router.add_get("/completions", self._completions)
        app.router.add_get("/picture", self._picture)

    async def look(self) -> None:
        while True:
            seen = await asyncio.to_thread(self._look)
            if seen != self.seen or not self.number:
                async with self.changed:
                    self.seen, self.number = seen, self.number + 1
                    self.changed.notify_all()
            await asyncio.sleep(LOOK_S)

    def _look(self) -> list[dict[str, Any]]:
        found = run_folders(self.given)
        self.runs = {name: self.runs.get(name) or WatchedRun(name, path) for name, path in found.items()}
        for run in self.runs.values():
            run.refresh()
        return [run.about() for run in self.runs.values()]

    def end(self) -> None:
        self.ended = True

    # --- requests ---------------------------------------------------------------------------------------------------

    async def _runs(self, request: web.Request) -> web.StreamResponse:
        """The list of runs, and again whenever something in it changes."""
        response, sent = new_stream(), 0
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda sent=sent: self.number > sent)
                sent, seen = self.number, self.seen
            await send(request, response, {"runs": seen})

    async def _run(self, request: web.Request) -> web.Response:
        run = self._named(request)
        return web.json_response(await asyncio.to_thread(run.report))

    async def _completions(self, request: web.Request) -> web.Response:
        run, query = self._named(request), request.query
        chosen = Filter(
            low=_number(query, "low", float),
            high=_number(query, "high", float),
            first=_number(query, "first", int),
            last=_number(query, "last", int),
            text=query.get("text", "")[:200],
            mixed=query.get("mixed") == "true",
            order=query.get("order", ORDERS[0]),
        )
        if chosen.order not in ORDERS:
            raise Refused(400, f"order must be one of {', '.join(ORDERS)}", "invalid_request")
        page = _number(query, "page", int) or 0
        rows = run.completions.rows.copy()
        return web.json_response(await asyncio.to_thread(completions, rows, chosen, max(page, 0)))

    async def _picture(self, request: web.Request) -> web.Response:
        run, what = self._named(request), request.query.get("what", "")
        if what not in PICTURES:
            raise Refused(404, f"what must be one of {', '.join(PICTURES)}", "invalid_request")
        png = await asyncio.to_thread(run.picture, what)
        if png is None:
            raise Refused(404, f"{run.name} has no numbers for {what}", "not_found")
        return web.Response(body=png, content_type="image/png", headers=HEADERS)

    def _named(self, request: web.Request) -> WatchedRun:
        name = request.query.get("name", "")
        if name not in self.runs:
            raise Refused(404, f"there is no run {name[:80]}", "not_found")
        return self.runs[name]


def _number(query, name: str, kind: Callable[[str], Any]) -> Any:
    """A number of a query; None where it is empty or left out."""
    if not (text := query.get(name, "")):
        return None
    try:
        return kind(text)
    except ValueError as problem:
        raise Refused(400, f"{name} {text[:40]} is not a number", "invalid_request") from problem
