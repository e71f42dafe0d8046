"""Runs the server for a loaded model. On SIGTERM it finishes its running requests and ends with status 0."""

import asyncio
import gc
import logging
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from aiohttp import web
from aiohttp.http import HttpProcessingError
from rich.console import Console

from dfactory.errors import ConfigError
from dfactory.inference import Pipeline
from dfactory.serving.access import Access
from dfactory.serving.app import OPEN_TO_ALL, Service
from dfactory.serving.bodies import Bodies
from dfactory.serving.bounds import MOST_ANSWERS
from dfactory.serving.connections import Connections
from dfactory.serving.engine import Engine
from dfactory.serving.live import Live, Model
from dfactory.serving.metrics import Metrics
from dfactory.serving.pages import Page
from dfactory.serving.receiving import Receiver
from dfactory.serving.requests import Reader

TOKEN_VARIABLE = "DFACTORY_SERVE_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHORTEST_TOKEN = 16
CLEANUP_S = 5.0  # to finish writing when all answers are decoded
LINGERING_S = 2.0  # to read the rest of a request that is already refused
BACKLOG = 1024  # connections that wait to be accepted
LONGEST = 4096  # tokens of prompt and answer, by default


class Options(NamedTuple):
    """The options of `dfactory serve`, apart from the model and the decode keys."""

    host: str = "127.0.0.1"
    port: int = 8080
    token_file: str | None = None
    model_name: str = "model"
    max_length: int | None = None
    max_queue: int = 64
    request_timeout: float = 600.0
    client_timeout: float = 30.0
    drain_timeout: float = 60.0


def read_token(host: str, token_file: str | None) -> str | None:
    """The token that clients must send, or None. Raises ConfigError if other machines can reach the address and there is no
    token."""
    if token_file is not None:
        if not Path(token_file).is_file():
            raise ConfigError(f"--token-file {token_file} does not exist: write a token into it, and nothing else")
        token, origin = Path(token_file).read_text(encoding="utf-8").strip(), f"--token-file {token_file}"
    else:
        token, origin = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if token is None:
        if host not in LOOPBACK:
            raise ConfigError(
                f"--host {host} lets other machines in: set {TOKEN_VARIABLE} or --token-file, or stay at 127.0.0.1"
            )
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{origin}: a token has at least {SHORTEST_TOKEN} printable ASCII characters and no space; make one with "
            "`openssl rand -hex 32`"
        )
    return token


def serve(pipeline: Pipeline, options: Options, console: Console, beside: dict[str, Pipeline] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0, or 1 if a decoder failed. `beside` are further models, by name, which the
    page compares with the first one; the API's endpoints answer with the first."""
    token = read_token(options.host, options.token_file)
    every = {options.model_name: pipeline} | (beside or {})
    models = {name: _model(name, one, options) for name, one in every.items()}
    receiver = Receiver(Connections(options.client_timeout), Bodies(options.client_timeout), options.request_timeout)
    page, live = Page("page"), Live(models, receiver)
    access = Access(token, OPEN_TO_ALL | page.paths)
    metrics = Metrics([model.engine for model in models.values()])
    service = Service(models[options.model_name], metrics, receiver, access, page, live, int(time.time()))
    return asyncio.run(_serve(service, options, console))


def _model(name: str, pipeline: Pipeline, options: Options) -> Model:
    rules = pipeline.rules
    pipeline = pipeline.over({"block_size": rules.block_size})  # the engine's, whatever a request asks for
    most = pipeline.policy.config.max_position_embeddings
    longest = options.max_length or min(most, LONGEST)
    if not rules.block_size <= longest <= most:
        raise ConfigError(
            f"--max-length {longest}: it must be from {rules.block_size}, one block, to {most}, the model's limit"
        )
    capacity = longest // rules.block_size * rules.block_size
    engine = Engine(pipeline.policy, rules, capacity, options.max_queue)
    return Model(Reader(name, pipeline, longest, min(MOST_ANSWERS, engine.most)), engine)


async def _serve(service: Service, options: Options, console: Console) -> int:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    gc.freeze()  # collections skip what exists now; else each one would stop all threads for seconds
    engines = service.engines
    runner = web.AppRunner(
        service.app(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=CLEANUP_S,
        auto_decompress=False,
        lingering_time=LINGERING_S,
        logger=_logger(),
    )
    await runner.setup()
    for engine in engines:
        engine.start()
    try:
        server = await _listen(service, runner, options)
        _announce(service, server.sockets[0].getsockname()[:2], console)
        await _until_stopped(service, stop, options, console)
        server.close()
    finally:
        for engine in engines:
            engine.close()
        service.receiver.connections.close_waiting()
        await runner.cleanup()
        await service.receiver.connections.all_closed(CLEANUP_S)
    return int(any(engine.failed for engine in engines))


class _Bugs(logging.Filter):
    """Keeps tracebacks of malformed HTTP requests out of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _logger() -> logging.Logger:
    logger = logging.getLogger(__name__)
    logger.addFilter(_Bugs())
    return logger


async def _listen(service: Service, runner: web.AppRunner, options: Options) -> asyncio.Server:
    try:
        return await asyncio.get_running_loop().create_server(
            service.receiver.connections.protocols(runner.server), options.host, options.port, backlog=BACKLOG
        )
    except OSError as problem:
        raise ConfigError(f"cannot listen on {options.host} port {options.port}: {problem.strerror}") from problem


def _announce(service: Service, address: tuple[str, int], console: Console) -> None:
    model, names = service.model, " and ".join(service.live.models)
    console.print(
        f"{names} on {url_of(address)}, {model.engine.slots} slots of {model.reader.longest} tokens, "
        f"{'with a token' if service.access.token else 'this machine only'}",
        soft_wrap=True,
    )


def url_of(address: tuple[str, int]) -> str:
    host, port = address
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def _until_stopped(service: Service, stop: asyncio.Event, options: Options, console: Console) -> None:
    """Wait for a signal or the engine's end. After a signal running requests have `drain_timeout` to finish."""
    engines = service.engines
    ends = [asyncio.create_task(asyncio.to_thread(engine.join)) for engine in engines]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((*ends, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not any(engine.failed for engine in engines):
        running, waiting = (sum(len(getattr(engine, jobs)) for engine in engines) for jobs in ("running", "waiting"))
        console.print(f"draining: {running} running, {waiting} waiting", soft_wrap=True)
    for engine in engines:
        engine.close()
    _, late = await asyncio.wait(ends, timeout=options.drain_timeout)
    if late:
        for engine in engines:
            engine.give_up_all()
