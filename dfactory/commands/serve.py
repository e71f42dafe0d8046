"""`dfactory serve`: serves a checkpoint over HTTP. The mechanism is in dfactory/serving."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from dfactory.commands.arguments import model_of
from dfactory.console import plain_console
from dfactory.decoding.keys import DecodeKeys
from dfactory.inference import Pipeline
from dfactory.serving.server import Options, read_token, serve


def run_server(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    read_token(arguments.host, arguments.token_file)  # before the model is read
    pipeline = Pipeline(**model_of(arguments), keys=keys)
    name = arguments.model_name or name_of(arguments.model)
    beside = {}
    for model in arguments.beside:
        other = next(one for one in unused_names(name_of(model)) if one != name and one not in beside)
        beside[other] = Pipeline(**model_of(arguments) | {"model": model}, keys=keys)
    options = Options(
        host=arguments.host,
        port=arguments.port,
        token_file=arguments.token_file,
        model_name=name,
        max_length=arguments.max_length,
        max_queue=arguments.max_queue,
        request_timeout=arguments.request_timeout,
        client_timeout=arguments.client_timeout,
        drain_timeout=arguments.drain_timeout,
    )
    return serve(pipeline, options, plain_console(stderr=True), beside)


def name_of(model: str) -> str:
    return Path(model).resolve().name


def unused_names(name: str) -> Iterator[str]:
    """The name, then the same with 2, 3, ... for models of one name."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))
