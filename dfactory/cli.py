"""`dfactory VERB ...`: parses words, calls one function, turns expected failures into a message and an exit status.

Exit status: 0 done, 1 failed, 2 wrong recipe or usage, 75 preempted after a saved checkpoint, 141 the reader of the output
has gone (`| head`). Every verb imports what it needs when it is called, so that --help answers at once.
"""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dfactory.commands import arguments as words
from dfactory.config.words import join_options
from dfactory.errors import ConfigError, DFactoryError
from dfactory.redaction import guard_output
from dfactory.startup import importing
from dfactory.versions import version_of

EXIT_UNREAD = 128 + signal.SIGPIPE  # as of a program that a broken pipe ends


def main(argv: list[str] | None = None) -> int:
    try:
        try:
            return _run(argv)
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()  # here and not at the interpreter's end, where nothing can be caught
    except BrokenPipeError:
        if not (unread := [fd for fd in (1, 2) if _has_no_reader(fd)]):
            raise  # another pipe or connection broke
        for fd in unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)  # takes what is still buffered
        return EXIT_UNREAD


def _has_no_reader(fd: int) -> bool:
    """Whether a file descriptor is a pipe that nobody reads."""
    watch = select.poll()
    watch.register(fd, 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _run(argv: list[str] | None) -> int:
    guard_output()
    parser, verbs = _parser()
    typed = sys.argv[1:] if argv is None else argv
    arguments, rest = parser.parse_known_args(_joined(typed, verbs))
    arguments.typed = typed
    overrides = _overrides(parser, arguments, rest)
    try:
        if arguments.computes:
            with importing("torch"):
                from dfactory.allocator import keep_freed_memory

            keep_freed_memory()
        return arguments.run(arguments, overrides) or 0
    except DFactoryError as failure:
        print(f"dfactory {arguments.verb}: {failure}", file=sys.stderr)
        return failure.exit_status
    except KeyboardInterrupt:
        return 130


def _joined(words: list[str], verbs: dict[str, argparse.ArgumentParser]) -> list[str]:
    """`--a.b v` becomes a.b=v where the verb takes key=value arguments."""
    verb = verbs.get(words[0]) if words else None
    if verb is None or not verb.get_default("takes_overrides"):
        return words
    return [words[0], *join_options(words[1:], verb._option_string_actions)]


def _overrides(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """key=value words, wherever they stand; any other word that no verb asked for is a usage error (status 2)."""
    stray = [word for word in rest if "=" not in word]
    if stray or (rest and not arguments.takes_overrides):
        parser.error(f"{arguments.verb} does not know {' '.join(stray or rest)}")
    return rest


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each verb."""
    parser = argparse.ArgumentParser(prog="dfactory", description="Post-training of block-diffusion language models.")
    parser.add_argument("--version", action="version", version=f"dfactory {version_of('dfactory')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        sub = verbs.add_parser(verb.name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        sub.set_defaults(run=verb.run, takes_overrides=bool(verb.overrides), computes=verb.computes)
        sub.epilog = f"further words: [{verb.overrides} ...]" if verb.overrides else None
        verb.add_arguments(sub)
    return parser, verbs.choices


def _train(arguments, overrides) -> int:
    with importing("dfactory.train"):
        recipe = _read(arguments, overrides).recipe
        from dfactory.train import train

    status = train(recipe)
    if status == 0 and os.environ.get("RANK", "0") == "0":
        from dfactory.commands.report import write_report  # matplotlib's import would hold up the first step

        print(f"report: {write_report([Path(recipe.output_dir)])}")
    return status


def _check(arguments, overrides) -> int:
    from dfactory.uptime import running

    began = running()
    with importing("dfactory.commands.check"):
        loaded = _read(arguments, overrides, arguments.gpus)
        from dfactory.commands.check import check

    return check(loaded, arguments.gpus, running().since(began))


def _generate(arguments, overrides) -> int:
    with importing("dfactory.commands.generate"):
        keys = _decode_keys(overrides)
        from dfactory.commands.generate import generate

    return generate(arguments, keys)


def _eval(arguments, overrides) -> int:
    keys = _decode_keys(overrides)
    if arguments.data is None and (arguments.repair or arguments.elbo_pairs):
        raise ConfigError("--repair and --elbo-pairs read records: give them with --data")
    if arguments.lm_eval:
        if arguments.thresholds or arguments.sweep:
            raise ConfigError("--sweep or --thresholds with --lm-eval: call it once for each value")
        from dfactory.commands.harness import evaluate_harness

        return evaluate_harness(arguments, keys)
    if arguments.repair:
        from dfactory.commands.repair import repair

        return repair(arguments, keys)
    if arguments.elbo_pairs is not None:
        from dfactory.commands.elbo import evaluate_elbo

        return evaluate_elbo(arguments, keys)
    with importing("dfactory.commands.evaluate"):
        from dfactory.commands.evaluate import evaluate

    return evaluate(arguments, keys)


def _chat(arguments, overrides) -> int:
    with importing("dfactory.commands.chat"):
        keys = _decode_keys(overrides)
        from dfactory.commands.chat import chat

    return chat(arguments, keys)


def _serve(arguments, overrides) -> int:
    with importing("dfactory.commands.serve"):
        keys = _decode_keys(overrides)
        from dfactory.commands.serve import run_server

    return run_server(arguments, keys)


def _export(arguments, overrides) -> int:
    if arguments.merge is not None:
        if arguments.dtype != "auto":
            raise ConfigError("--dtype with --merge: a mean keeps its checkpoints' precision; export it once more")
        if arguments.mask_token is not None:
            raise ConfigError("--mask-token with --merge: the checkpoints of a run have their mask; leave it out")
        from dfactory.config.load import load_merge_keys

        keys = load_merge_keys(arguments.merge)
    from dfactory.commands.export import About, export

    if arguments.private and arguments.push_to_hub is None:
        raise ConfigError("--private is about the repository of --push-to-hub: give both, or neither")
    push = None
    if arguments.push_to_hub is not None:
        from dfactory.commands.pushing import Push

        push = Push(arguments.push_to_hub, arguments.private)
    about = About(not arguments.no_card, arguments.license, arguments.push_to_hub, arguments.sglang)
    if arguments.merge is None:
        status = export(arguments.model, arguments.output, arguments.dtype, arguments.mask_token, about)
    else:
        from dfactory.commands.merge import merge

        status = merge(arguments.model, arguments.output, keys, about)
    if push is not None:
        print(f"uploaded: {push.upload(Path(arguments.output))}")
    return status


def _schema(arguments, overrides) -> int:
    from dfactory.commands.schema import algorithms, earlier, resuming, rules, schema

    if arguments.families:
        from dfactory.commands.families import families  # which needs transformers

        return families()
    if arguments.resume:
        return resuming()
    if arguments.rules:
        return rules()
    if arguments.algorithms:
        return algorithms()
    return earlier() if arguments.earlier else schema(arguments.markdown)


def _data(arguments, overrides) -> int:
    from dfactory.data_tools.command import VERBS, dispatch

    if arguments.tool not in VERBS:
        raise ConfigError(f"{arguments.tool} is not a data tool: use one of {', '.join(VERBS)}")
    return dispatch(arguments.tool, arguments.words)


def _bench(arguments, overrides) -> int:
    from dfactory.commands.bench import bench

    return bench(arguments.name, arguments.words)


def _quickstart(arguments, overrides) -> int:
    from dfactory.commands.quickstart import quickstart

    return quickstart(overrides)


def _recipes(arguments, overrides) -> int:
    from dfactory.commands.recipes import recipes

    return recipes(arguments.output)


def _doctor(arguments, overrides) -> int:
    from dfactory.commands.doctor import doctor

    return doctor()


def _report(arguments, overrides) -> int:
    if arguments.watch:
        if arguments.chain or arguments.output:
            raise ConfigError("--watch with --chain or --output: it serves a page and writes nothing; leave them out")
        from dfactory.commands.reporting.watch import Options, watch

        options = Options(arguments.host, arguments.port, arguments.token_file)
        return watch([Path(run) for run in arguments.runs], options)
    from dfactory.commands.report import report

    return report(arguments.runs, arguments.output, arguments.chain)


def _read(arguments, overrides, ranks: int | None = None):
    """The recipe, read before the heavy imports so that a wrong key fails at once. Prints what became of keys of the
    earlier dFactory."""
    from dfactory.recipe import read_recipe

    loaded = read_recipe(arguments.recipe, overrides, ranks)
    if loaded.aliases and os.environ.get("RANK", "0") == "0":
        from dfactory.commands.schema import show_aliases

        show_aliases(loaded.aliases)
    return loaded


def _decode_keys(overrides):
    """Before the heavy imports too."""
    from dfactory.decoding.keys import load_decode_keys

    return load_decode_keys(overrides)


class Verb(NamedTuple):
    name: str
    run: Callable[[argparse.Namespace, list[str]], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str
    overrides: str = ""  # the form of the key=value words that it takes
    computes: bool = False  # whether it runs a model for long, see allocator.py


VERBS = (
    Verb("train", _train, words.train, "train by a recipe", "key=value", computes=True),
    Verb("check", _check, words.check, "dry run of a recipe: keys, data, template, steps, memory", "key=value"),
    Verb(
        "generate", _generate, words.generate, "answer the prompts of a JSONL file", "decode.key=value", computes=True
    ),
    Verb(
        "eval",
        _eval,
        words.evaluate,
        "exact match and tokens per forward on records, tasks or lm-eval's; or the ELBO",
        "decode.key=value",
        computes=True,
    ),
    Verb("chat", _chat, words.chat, "talk to a model and watch it denoise", "decode.key=value", computes=True),
    Verb(
        "serve", _serve, words.serve, "answer over HTTP, also as OpenAI's API does", "decode.key=value", computes=True
    ),
    Verb(
        "export",
        _export,
        words.export,
        "write a checkpoint as a plain model directory; merges adapters and checkpoints",
    ),
    Verb("schema", _schema, words.schema, "every recipe and decode key with its type, default and meaning"),
    Verb(
        "data",
        _data,
        words.data,
        "gguf, convert, validate, stats, sample, decontaminate, ...: tools for record files",
    ),
    Verb(
        "bench",
        _bench,
        words.bench,
        "run one of the programs of benchmarks/ in a checkout: step, decoding, growth, ...",
    ),
    Verb("report", _report, words.report, "draw the curves of finished or running runs"),
    Verb("recipes", _recipes, words.recipes, "list the recipes that come with dFactory, or copy them"),
    Verb(
        "quickstart",
        _quickstart,
        words.quickstart,
        "take the embedded model through every stage, minutes on a CPU",
        "key=value",
    ),
    Verb("doctor", _doctor, words.doctor, "print the environment, what is missing for which feature, and the fix"),
)


if __name__ == "__main__":
    sys.exit(main())
