"""`dfactory VERB ...`: parses words, calls one function, turns expected failures into a message and an exit status.

Exit status: 0 done, 1 failed, 2 wrong recipe or usage, 75 preempted after a saved checkpoint. Every verb imports what it
needs when it is called, so that --help answers at once.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from dfactory.config.words import MODEL_HELP, join_options
from dfactory.errors import ConfigError, DFactoryError
from dfactory.redaction import guard_output


def main(argv: list[str] | None = None) -> int:
    guard_output()
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
    generate.add_argument(
        "--input", required=True, help=".jsonl, .jsonl.gz or .parquet: prompts, or records without their answer"
    )
    generate.add_argument("--output", required=True, help="JSONL: each input line with its response")
    generate.add_argument(
        "--keep-trace", action="store_true", help="also write when each token was committed, to train on trajectories"
    )

    evaluate = verb(
        "eval",
        _eval,
        "exact match and tokens per forward on records, tasks or lm-eval's; or the ELBO",
        "decode.key=value",
    )
    _model_arguments(evaluate)
    questions = evaluate.add_mutually_exclusive_group(required=True)
    questions.add_argument("--data", help=".jsonl, .jsonl.gz or .parquet: prompts with an answer column")
    questions.add_argument("--task", action="append", help="a task of reasoning-gym, scored by it; may be repeated")
    questions.add_argument("--lm-eval", action="append", metavar="TASK", help="a task of lm-eval; may be repeated")
    evaluate.add_argument(
        "--output", help="also write the responses, each record's ELBO, the sweep or lm-eval's results"
    )
    evaluate.add_argument("--count", type=_positive, default=100, help="questions of a --task (default: %(default)s)")
    evaluate.add_argument("--include-path", help="folder of YAML tasks for --lm-eval")
    evaluate.add_argument("--limit", type=_positive, help="the first so many questions of a --lm-eval task")
    evaluate.add_argument("--chat-template", action="store_true", help="ask --lm-eval's questions as a conversation")
    instead = evaluate.add_mutually_exclusive_group()
    instead.add_argument(
        "--thresholds",
        type=_thresholds,
        metavar="T,T,...",
        help="ask at each threshold; a run folder gets the lines in thresholds.jsonl, which `report` draws",
    )
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

    chat = verb("chat", _chat, "talk to a model and watch it denoise", "decode.key=value")
    _model_arguments(chat)
    chat.add_argument("--trace", metavar="FILE", help="write an animation, .html or .gif, after every answer")
    chat.add_argument("--delay", type=_seconds, default=0.0, help="seconds to wait after each forward (default: 0)")

    serve = verb("serve", _serve, "answer over HTTP, also as OpenAI's API does", "decode.key=value")
    _model_arguments(serve)
    serve.add_argument("--host", default="127.0.0.1", help="another one needs DFACTORY_SERVE_TOKEN or --token-file")
    serve.add_argument("--port", type=_port, default=8080, help="0: any free one, which it prints")
    serve.add_argument("--token-file", help="file with the token that clients have to show")
    serve.add_argument("--model-name", help="under which clients ask for it (default: the directory's)")
    serve.add_argument("--max-length", type=_positive, help="tokens of prompt and answer (default: 4096 at most)")
    serve.add_argument("--max-queue", type=_positive, default=64, help="answers that may wait (default: %(default)s)")
    serve.add_argument("--request-timeout", type=_seconds, default=600.0, help="seconds (default: %(default)s)")
    serve.add_argument(
        "--client-timeout", type=_seconds, default=30.0, help="seconds to send a request in (default: %(default)s)"
    )
    serve.add_argument(
        "--drain-timeout", type=_seconds, default=60.0, help="seconds, at SIGTERM (default: %(default)s)"
    )

    export = verb("export", _export, "write a checkpoint as a plain model directory; merges adapters and checkpoints")
    export.add_argument("--model", required=True, help=MODEL_HELP)
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

    data = verb("data", _data, "convert, validate, mix, split, dedup, preferences, rollouts, preview of record files")
    data.add_argument("tool", metavar="VERB", help="one of these; `dfactory data VERB --help` tells its words")
    data.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its words")

    bench = verb("bench", _bench, "run one of the programs of benchmarks/ in a checkout: step, decoding, growth, ...")
    bench.add_argument("name", metavar="NAME", help="an unknown one lists them; `dfactory bench NAME --help` its words")
    bench.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its words")

    report = verb("report", _report, "draw the curves of finished or running runs")
    report.add_argument("runs", nargs="+", help="run folders")
    report.add_argument("--output", help="folder of the report (default: report/ of the first run)")

    form = verbs.choices["schema"].add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as the tables of recipes/KEYS.md")
    form.add_argument("--earlier", action="store_true", help="keys of the earlier dFactory and what becomes of each")
    form.add_argument("--algorithms", action="store_true", help="the algorithms, as the table of docs/algorithms.md")
    form.add_argument("--families", action="store_true", help="the model families, as the table of docs/families.md")
    form.add_argument("--rules", action="store_true", help="the decoding rules, as the table of docs/decoding.md")
    form.add_argument("--resume", action="store_true", help="what a resumed run does with each key that has changed")
    return parser, verbs.choices


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--init-weights", default="pretrained", choices=("pretrained", "random"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's"
    )
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _thresholds(text: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not a list of thresholds such as 0.5,0.7,0.9,0.95")
    return values


def _train(arguments, overrides) -> int:
    recipe = _read(arguments, overrides).recipe
    from dfactory.train import train

    status = train(recipe)
    if status == 0 and os.environ.get("RANK", "0") == "0":
        from dfactory.commands.report import write_report  # matplotlib's import would hold up the first step

        print(f"report: {write_report([Path(recipe.output_dir)])}")
    return status


def _check(arguments, overrides) -> int:
    began = time.monotonic()
    loaded = _read(arguments, overrides, arguments.gpus)
    from dfactory.commands.check import check

    return check(loaded, arguments.gpus, time.monotonic() - began)


def _generate(arguments, overrides) -> int:
    from dfactory.decoding.keys import load_decode_keys

    keys = load_decode_keys(overrides)
    from dfactory.commands.generate import generate

    return generate(arguments, keys)


def _eval(arguments, overrides) -> int:
    from dfactory.decoding.keys import load_decode_keys

    keys = load_decode_keys(overrides)
    if arguments.data is None and (arguments.repair or arguments.elbo_pairs):
        raise ConfigError("--repair and --elbo-pairs read records: give them with --data")
    if arguments.lm_eval:
        if arguments.thresholds:
            raise ConfigError("--thresholds with --lm-eval: call it once for each decode.threshold")
        from dfactory.commands.harness import evaluate_harness

        return evaluate_harness(arguments, keys)
    if arguments.repair:
        from dfactory.commands.repair import repair

        return repair(arguments, keys)
    if arguments.elbo_pairs is not None:
        from dfactory.commands.elbo import evaluate_elbo

        return evaluate_elbo(arguments, keys)
    from dfactory.commands.evaluate import evaluate

    return evaluate(arguments, keys)


def _chat(arguments, overrides) -> int:
    from dfactory.decoding.keys import load_decode_keys

    keys = load_decode_keys(overrides)
    from dfactory.commands.chat import chat

    return chat(arguments, keys)


def _serve(arguments, overrides) -> int:
    from dfactory.decoding.keys import load_decode_keys

    keys = load_decode_keys(overrides)
    from dfactory.commands.serve import run_server

    return run_server(arguments, keys)


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


def _report(arguments, overrides) -> int:
    from dfactory.commands.report import report

    return report(arguments.runs, arguments.output)


def _read(arguments, overrides, ranks: int | None = None):
    """The recipe; what became of keys of the earlier dFactory is printed. Before the heavy imports: a wrong key is told at
    once."""
    from dfactory.recipe import read_recipe

    loaded = read_recipe(arguments.recipe, overrides, ranks)
    if loaded.aliases and os.environ.get("RANK", "0") == "0":
        from dfactory.commands.schema import show_aliases

        show_aliases(loaded.aliases)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
