"""`dfactory VERB ...`: parses words, calls one function, turns expected failures into a message and an exit status.

Exit status: 0 done, 1 failed, 2 wrong recipe or usage, 75 preempted after a saved checkpoint. Every verb imports what it
needs when it is called, so that --help answers at once.
"""

import argparse
import os
import sys
from pathlib import Path

from dfactory.config.words import join_options
from dfactory.errors import ConfigError, DFactoryError


def main(argv: list[str] | None = None) -> int:
    parser, verbs = _parser()
    arguments, rest = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv, verbs))
    overrides = _overrides(parser, arguments, rest)
    try:
        return arguments.run(arguments, overrides) or 0
    except DFactoryError as failure:
        print(f"dfactory {arguments.verb}: {failure}", file=sys.stderr)
        return failure.exit_status
    except KeyboardInterrupt:
        return 130


def _joined(words: list[str], verbs: dict[str, argparse.ArgumentParser]) -> list[str]:
    """`--a.b v` becomes a.b=v where the verb takes key=value words."""
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
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run, summary: str, overrides: str = "") -> argparse.ArgumentParser:
        usage_tail = f" [{overrides} ...]" if overrides else ""
        sub = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.usage = None
        sub.set_defaults(run=run, takes_overrides=bool(overrides))
        sub.epilog = f"further words:{usage_tail}" if overrides else None
        return sub

    train = verb("train", _train, "train by a recipe", "key=value")
    train.add_argument("recipe", help="YAML file")

    check = verb("check", _check, "dry run of a recipe: keys, data, template, steps, memory", "key=value")
    check.add_argument("recipe", help="YAML file")
    check.add_argument(
        "--gpus", type=int, default=None, help="ranks of the memory forecast (default: 1, 8, 16 ... 128)"
    )

    generate = verb("generate", _generate, "answer the prompts of a JSONL file", "decode.key=value")
    _model_arguments(generate)
    generate.add_argument("--input", required=True, help="JSONL: messages, prompt or prompt_ids in each line")
    generate.add_argument("--output", required=True, help="JSONL: each input line with its response")
    generate.add_argument(
        "--keep-trace", action="store_true", help="also write when each token was committed, to train on trajectories"
    )

    evaluate = verb(
        "eval", _eval, "exact match and tokens per forward on records with answers, or the ELBO", "decode.key=value"
    )
    _model_arguments(evaluate)
    evaluate.add_argument(
        "--data", required=True, help="JSONL: messages, prompt or prompt_ids, and answer in each line"
    )
    evaluate.add_argument("--output", help="also write the responses, as `generate` does, or each record's ELBO")
    instead = evaluate.add_mutually_exclusive_group()
    instead.add_argument(
        "--elbo-pairs",
        type=_positive,
        metavar="N",
        help="score the responses of training records instead: ELBO and perplexity bound by N pairs of views",
    )
    instead.add_argument(
        "--repair",
        action="store_true",
        help="plant a wrong token in each record's own answer and tell what editing repairs, and what it spoils",
    )

    export = verb("export", _export, "write a checkpoint as a plain model directory; merges adapters and checkpoints")
    export.add_argument("--model", required=True, help="run folder or checkpoint")
    export.add_argument("--output", required=True, help="new directory")
    export.add_argument(
        "--merge",
        nargs="+",
        metavar="key=value",
        help="topk=K [metric=eval/loss] [mode=min|max]: the mean of the K best checkpoints of a run folder",
    )
    export.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's"
    )

    verb("schema", _schema, "every recipe and decode key with its type, default and meaning")

    report = verb("report", _report, "draw the curves of finished or running runs")
    report.add_argument("runs", nargs="+", help="run folders")
    report.add_argument("--output", help="folder of the report (default: report/ of the first run)")

    form = verbs.choices["schema"].add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as the tables of recipes/KEYS.md")
    form.add_argument("--earlier", action="store_true", help="keys of the earlier dFactory and what becomes of each")
    return parser, verbs.choices


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model directory, run folder, or `tiny`")
    parser.add_argument("--init-weights", default="pretrained", choices=("pretrained", "random"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's"
    )
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def _train(arguments, overrides) -> int:
    recipe = _read(arguments, overrides).recipe
    from dfactory.commands.report import write_report
    from dfactory.train import train

    status = train(recipe)
    if status == 0 and os.environ.get("RANK", "0") == "0":
        print(f"report: {write_report([Path(recipe.output_dir)])}")
    return status


def _check(arguments, overrides) -> int:
    loaded = _read(arguments, overrides, arguments.gpus)
    from dfactory.commands.check import check

    return check(loaded, arguments.gpus)


def _generate(arguments, overrides) -> int:
    from dfactory.config.load import load_decode_keys

    keys = load_decode_keys(overrides)
    from dfactory.commands.generate import generate

    return generate(arguments, keys)


def _eval(arguments, overrides) -> int:
    from dfactory.config.load import load_decode_keys

    keys = load_decode_keys(overrides)
    if arguments.repair:
        from dfactory.commands.repair import repair

        return repair(arguments, keys)
    if arguments.elbo_pairs is not None:
        from dfactory.commands.elbo import evaluate_elbo

        return evaluate_elbo(arguments, keys)
    from dfactory.commands.evaluate import evaluate

    return evaluate(arguments, keys)


def _export(arguments, overrides) -> int:
    if arguments.merge is not None:
        if arguments.dtype != "auto":
            raise ConfigError("--dtype with --merge: a mean keeps its checkpoints' precision; export it once more")
        from dfactory.config.load import load_merge_keys

        keys = load_merge_keys(arguments.merge)
        from dfactory.commands.merge import merge

        return merge(arguments.model, arguments.output, keys)
    from dfactory.commands.export import export

    return export(arguments.model, arguments.output, arguments.dtype)


def _schema(arguments, overrides) -> int:
    from dfactory.commands.schema import earlier, schema

    return earlier() if arguments.earlier else schema(arguments.markdown)


def _report(arguments, overrides) -> int:
    from dfactory.commands.report import report

    return report(arguments.runs, arguments.output)


def _read(arguments, overrides, ranks: int | None = None):
    """The recipe; what became of keys of the earlier dFactory is printed. Before the heavy imports: a wrong key is told at
    once."""
    from dfactory.config.load import read_recipe

    loaded = read_recipe(arguments.recipe, overrides, ranks)
    if loaded.aliases and os.environ.get("RANK", "0") == "0":
        from dfactory.commands.schema import show_aliases

        show_aliases(loaded.aliases)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
