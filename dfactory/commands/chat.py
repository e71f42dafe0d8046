"""`dfactory chat`: a conversation with a checkpoint, its denoising live. The mechanism is in dfactory/serving."""

import argparse
import dataclasses
from pathlib import Path

from dfactory.commands.generate import Answerer
from dfactory.console import plain_console
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import ConfigError
from dfactory.serving.terminal import Chat
from dfactory.serving.trace import check_trace_path


def chat(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    trace = Path(arguments.trace) if arguments.trace else None
    if trace is not None:
        check_trace_path(trace)
    answerer = Answerer(arguments, keys)
    if answerer.vocabulary.encoder is None:
        raise ConfigError(f"{arguments.model} has no tokenizer: `dfactory generate` takes prompt_ids")
    keys = dataclasses.replace(keys, block_size=answerer.rules.block_size)
    console = plain_console()
    Chat(answerer.policy, answerer.vocabulary, keys, console, trace=trace, delay=arguments.delay).run()
    return 0
