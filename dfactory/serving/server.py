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
from dfactory.serving.app import Service
from dfactory.serving.bodies import Bodies
from dfactory.serving.bounds import MOST_ANSWERS
from dfactory.serving.connections import Connections
from dfactory.serving.engine import Engine
from dfactory.serving.metrics import Metrics
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


def serve(pipeline: Pipeline, options: Options, console: Console) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0, or 1 if the decoder failed."""
    token, rules = read_token(options.host, options.token_file), pipeline.rules
    pipeline = pipeline.over({"block_size": rules.block_size})  # the engine's, whatever a request asks for
    most = pipeline.policy.config.max_position_embeddings
    longest = options.max_length or min(most, LONGEST)
    if not rules.block_size <= longest <= most:
        raise ConfigError(
            f"--max-length {longest}: it must be from {rules.block_size}, one block, to {most}, the model's limit"
        )
    capacity = longest // rules.block_size * rules.block_size
    engine = Engine(pipeline.policy, rules, capacity, options.max_queue)
    service = Service(
        Reader(options.model_name, pipeline, longest, min(MOST_ANSWERS, engine.most)),
        engine,
        Metrics(engine),
        Connections(options.client_timeout),
        Bodies(options.client_timeout),
        token,
        options.request_timeout,
        int(time.time()),
    )
    return asyncio.run(_serve(service, options, console))


async def _serve(service: Service, options: Options, console: Console) -> int:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    gc.freeze()  # collections skip what exists now; else each one would stop all threads for seconds
    engine = service.engine
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
    engine.start()
    try:
        server = await _listen(service, runner, options)
        _announce(service, server.sockets[0].getsockname()[:2], console)
        await _until_stopped(service, stop, options, console)
        server.close()
    finally:
        engine.close()
        service.connections.close_waiting()
        await runner.cleanup()
        await service.connections.all_closed(CLEANUP_S)
    return int(engine.failed)


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
            service.connections.protocols(runner.server), options.host, options.port, backlog=BACKLOG
        )
    except OSError as problem:
        raise ConfigError(f"cannot listen on {options.host} port {options.port}: {problem.strerror}") from problem


def _announce(service: Service, address: tuple[str, int], console: Console) -> None:
    host, port = address
    console.print(
        f"{service.reader.name} on http://{f'[{host}]' if ':' in host else host}:{port}, {service.engine.slots} slots of "
        f"{service.reader.longest} tokens, {'with a token' if service.token else 'this machine only'}",
        soft_wrap=True,
    )


async def _until_stopped(service: Service, stop: asyncio.Event, options: Options, console: Console) -> None:
    """Wait for a signal or the engine's end. After a signal running requests have `drain_timeout` to finish."""
    engine = service.engine
    failed = asyncio.create_task(asyncio.to_thread(engine.join))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((failed, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not engine.failed:
        console.print(f"draining: {len(engine.running)} running, {len(engine.waiting)} waiting", soft_wrap=True)
    engine.close()
    try:
        await asyncio.wait_for(asyncio.shield(failed), options.drain_timeout)
    except TimeoutError:
        engine.give_up_all()
