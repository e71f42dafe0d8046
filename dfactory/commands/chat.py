"""`dfactory chat`: a conversation with a checkpoint, its denoising live. The mechanism is in dfactory/serving."""

import argparse
from pathlib import Path

from dfactory.commands.arguments import model_of
from dfactory.console import plain_console
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import ConfigError
from dfactory.inference import Pipeline
from dfactory.serving.terminal import Chat
from dfactory.serving.trace import check_trace_path


def chat(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    trace = Path(arguments.trace) if arguments.trace else None
    if trace is not None:
        check_trace_path(trace)
    pipeline = Pipeline(**model_of(arguments), keys=keys)
    if pipeline.vocabulary.encoder is None:
        raise ConfigError(f"{arguments.model} has no tokenizer: `dfactory generate` takes prompt_ids")
    Chat(pipeline, plain_console(), trace=trace, delay=arguments.delay).run()
    return 0
