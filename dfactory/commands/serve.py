"""`dfactory serve`: serves a checkpoint over HTTP. The mechanism is in dfactory/serving."""

import argparse
from pathlib import Path

from dfactory.commands.arguments import model_of
from dfactory.console import plain_console
from dfactory.decoding.keys import DecodeKeys
from dfactory.inference import Pipeline
from dfactory.serving.server import Options, read_token, serve


def run_server(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    read_token(arguments.host, arguments.token_file)  # before the model is read
    pipeline = Pipeline(**model_of(arguments), keys=keys)
    options = Options(
        host=arguments.host,
        port=arguments.port,
        token_file=arguments.token_file,
        model_name=arguments.model_name or Path(arguments.model).resolve().name,
        max_length=arguments.max_length,
        max_queue=arguments.max_queue,
        request_timeout=arguments.request_timeout,
        client_timeout=arguments.client_timeout,
        drain_timeout=arguments.drain_timeout,
    )
    return serve(pipeline, options, plain_console(stderr=True))
