"""The verbs of `dfactory data`, each a module of this package with `main(words) -> exit status`.

`dfactory data VERB ...` and, in a checkout, `python -m data_tools.VERB ...` are the same: an expected failure is a message
and its exit status. A module is imported when its verb is called.
"""

import argparse
import importlib
import sys
from collections.abc import Callable

from dfactory.config.words import MODEL_HELP, TEMPLATE_HELP
from dfactory.console import plain_console
from dfactory.errors import ConfigError, DFactoryError
from dfactory.redaction import guard_output

VERBS = {
    "gguf": "write a plain model directory from a GGUF file",
    "convert": "write Alpaca, ShareGPT, OpenAI, TRL, question/answer or parquet rows as one of the readers' formats",
    "validate": "report on record files: bad lines, duplicates, lengths in tokens, roles, trained share",
    "stats": "what files hold: columns, values, roles, turns, lengths, as a page or as JSON",
    "token-count": "tokens and trained tokens of files, and of the values of a column",
    "mix": "one shuffled file of several, each with a weight",
    "split": "two or more files of one; a prompt is in one of them only",
    "sample": "some rows of files, the same ones for the same seed",
    "decontaminate": "leave out records that hold the questions of evaluation files",
    "dedup": "leave out records that are there already",
    "export-parquet": "write files as parquet shards of one schema, as the hub wants them",
    "preferences": "sample answers from a model and rank them by a reward: prompt, chosen, rejected",
    "rollouts": "decode answers with their traces and a reward's verdict, for trajectory training",
    "distil": "write an autoregressive model's own answers to prompts as records",
    "preview": "show tokenised examples with their trained tokens marked",
}

Main = Callable[[list[str] | None], int]


def dispatch(verb: str, words: list[str]) -> int:
    """Run one verb. Raises DFactoryError."""
    return importlib.import_module(f"dfactory.data_tools.{verb.replace('-', '_')}").main(words)


def run(main: Main, verb: str) -> int:
    """`main` on the words of this process; an expected failure becomes a message and its exit status."""
    guard_output()
    try:
        return main(None)
    except DFactoryError as failure:
        print(f"dfactory data {verb}: {failure}", file=sys.stderr)
        return failure.exit_status
    except KeyboardInterrupt:
        return 130


def say(text: str) -> None:
    """A line on standard error, however long the paths in it are."""
    plain_console(stderr=True).print(text, soft_wrap=True)


def parser_of(verb: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"dfactory data {verb}", description=VERBS[verb], epilog=epilog)


def add_vocabulary_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """What a tokenizer and its special ids are taken from."""
    parser.add_argument("--model", required=required, help=f"{MODEL_HELP}: its tokenizer")
    parser.add_argument("--chat-template", metavar="FILE|NAME", help=TEMPLATE_HELP)
    parser.add_argument(
        "--mask-token-id", type=int, help="where the model knows none; default: as mask_token auto chooses"
    )
    parser.add_argument("--eos-token-id", type=int, help="where the tokenizer names none")


def vocabulary_of(options: argparse.Namespace):
    """The Vocabulary of `add_vocabulary_arguments`."""
    from dfactory.data.mask_choice import AUTO  # transformers takes seconds
    from dfactory.vocabulary import read_vocabulary

    return read_vocabulary(
        options.model,
        mask_token_id=options.mask_token_id,
        mask_token=AUTO if options.mask_token_id is None else None,
        eos_token_id=options.eos_token_id,
        chat_template_path=options.chat_template,
    )


def split_overrides(parser: argparse.ArgumentParser, words: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the key=value words beside them. Any other word is a usage error (status 2)."""
    options, rest = parser.parse_known_args(words)
    if stray := [word for word in rest if "=" not in word or word.startswith("--")]:
        parser.error(f"does not know {' '.join(stray)}")
    return options, rest


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def named_numbers(words: list[str], meaning: str) -> dict[str, float]:
    """NAME=NUMBER words, in their order. Raises ConfigError."""
    numbers = {}
    for word in words:
        name, _, value = word.rpartition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ConfigError(f"{word}: give {meaning}") from None
        if not name or not 0 <= numbers[name] < float("inf"):
            raise ConfigError(f"{word}: give {meaning}, the number 0 or more")
    return numbers
