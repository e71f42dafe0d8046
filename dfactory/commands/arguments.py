"""The arguments of each verb, and those that data tools share with verbs. Light: `--help` imports nothing else."""

import argparse
import re
from typing import Any

from dfactory.config.words import MODEL_HELP, RECORDS_HELP
from dfactory.data.answers import ANSWER_PATTERN_HELP

OF_A_MODEL = ("model", "dtype", "device", "init_weights")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What a Pipeline is loaded from."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--init-weights", default="pretrained", choices=("pretrained", "random"))
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="auto: the checkpoint's, but float32 for bfloat16 on a CPU that is slow in it",
    )
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")


def model_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a Pipeline that these words state."""
    return {name: getattr(arguments, name) for name in OF_A_MODEL}


# --- verbs, in the order of --help -------------------------------------------------------------------------------------


def train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")


def check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument(
        "--gpus", type=int, default=None, help="ranks of the memory forecast (default: 1, 8, 16 ... 128)"
    )


def generate(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--input", required=True, help=f"{RECORDS_HELP}: prompts, or records without their answer")
    parser.add_argument("--output", required=True, help="JSONL: each input line with its response")
    parser.add_argument(
        "--keep-trace", action="store_true", help="also write when each token was committed, to train on trajectories"
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument("--data", help=f"{RECORDS_HELP}: prompts with an answer column")
    questions.add_argument("--task", action="append", help="a task of reasoning-gym, scored by it; may be repeated")
    questions.add_argument("--lm-eval", action="append", metavar="TASK", help="a task of lm-eval; may be repeated")
    parser.add_argument("--output", help="also write the responses, each record's ELBO, the sweep or lm-eval's results")
    parser.add_argument("--answer-pattern", metavar="REGEX", help=ANSWER_PATTERN_HELP)
    parser.add_argument("--count", type=positive, default=100, help="questions of a --task (default: %(default)s)")
    parser.add_argument("--include-path", help="folder of YAML tasks for --lm-eval")
    parser.add_argument("--limit", type=positive, help="the first so many questions of a --lm-eval task")
    parser.add_argument("--chat-template", action="store_true", help="ask --lm-eval's questions as a conversation")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--thresholds",
        type=thresholds,
        metavar="T,T,...",
        help="the same for the threshold of the rule that is the default; in thresholds.jsonl",
    )
    instead.add_argument(
        "--sweep",
        type=sweep,
        metavar="KEY=V,V,...",
        help="ask at each value of a decode key; a run folder gets the lines in sweep_KEY.jsonl, which `report` draws",
    )
    instead.add_argument(
        "--elbo-pairs",
        type=positive,
        metavar="N",
        help="score the responses of training records instead: ELBO and perplexity bound by N pairs of views",
    )
    instead.add_argument(
        "--repair",
        action="store_true",
        help="plant a wrong token in each record's own answer and tell what editing repairs, and what it spoils",
    )


def chat(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--trace", metavar="FILE", help="write an animation, .html or .gif, after every answer")
    parser.add_argument("--delay", type=seconds, default=0.0, help="seconds to wait after each forward (default: 0)")


def serve(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="another one needs DFACTORY_SERVE_TOKEN or --token-file")
    parser.add_argument("--port", type=port, default=8080, help="0: any free one, which it prints")
    parser.add_argument("--token-file", help="file with the token that clients have to show")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="MODEL",
        help="a further model, which the page at / compares with the first one; may be repeated",
    )
    parser.add_argument("--model-name", help="under which clients ask for it (default: the directory's)")
    parser.add_argument("--max-length", type=positive, help="tokens of prompt and answer (default: 4096 at most)")
    parser.add_argument("--max-queue", type=positive, default=64, help="answers that may wait (default: %(default)s)")
    parser.add_argument("--request-timeout", type=seconds, default=600.0, help="seconds (default: %(default)s)")
    parser.add_argument(
        "--client-timeout", type=seconds, default=30.0, help="seconds to send a request in (default: %(default)s)"
    )
    parser.add_argument(
        "--drain-timeout", type=seconds, default=60.0, help="seconds, at SIGTERM (default: %(default)s)"
    )


def export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--output", required=True, help="new directory")
    parser.add_argument(
        "--merge",
        nargs="+",
        metavar="key=value",
        help="topk=K [metric=eval/loss] [mode=min|max]: the mean of the K best checkpoints of a run folder",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's"
    )
    parser.add_argument(
        "--mask-token",
        metavar="auto|TEXT",
        help="give an autoregressive model its mask token, as the recipe's key does",
    )
    parser.add_argument(
        "--sglang",
        action="store_true",
        help="also write sglang.yaml and sglang.sh, which serve the model by the recipe's decode keys",
    )
    parser.add_argument(
        "--license",
        type=licence,
        metavar="ID",
        help="of the model card, as the hub spells it: apache-2.0 (default: that of what the model was made from)",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="also upload the directory to the hub, with the token in HF_TOKEN or of `hf auth login`",
    )
    parser.add_argument("--private", action="store_true", help="a repository that --push-to-hub makes is private")
    parser.add_argument(
        "--no-card",
        action="store_true",
        help="write neither README.md, the model card, nor dfactory.json: recipe, data and numbers stay here",
    )


def schema(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as the tables of recipes/KEYS.md")
    form.add_argument("--earlier", action="store_true", help="keys of the earlier dFactory and what becomes of each")
    form.add_argument("--algorithms", action="store_true", help="the algorithms, as the table of docs/algorithms.md")
    form.add_argument("--families", action="store_true", help="the model families, as the table of docs/families.md")
    form.add_argument("--rules", action="store_true", help="the decoding rules, as the table of docs/decoding.md")
    form.add_argument("--resume", action="store_true", help="what a resumed run does with each key that has changed")


def data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tool", metavar="VERB", help="one of these; `dfactory data VERB --help` tells its words")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its words")


def bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="an unknown one lists them; `dfactory bench NAME --help` its words"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its words")


def report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="run folders; with --watch also folders with run folders in them")
    parser.add_argument("--output", help="folder of the report (default: report/ of the first run)")
    parser.add_argument(
        "--chain",
        action="store_true",
        help="a page of stages that start from each other: the runs and all that they were made from, a section each",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve a page of the runs instead, which follows those that are still trained",
    )
    parser.add_argument("--host", default="127.0.0.1", help="of --watch; another one needs a token, as for serve")
    parser.add_argument("--port", type=port, default=8090, help="of --watch (default: %(default)s); 0: any free one")
    parser.add_argument("--token-file", help="of --watch: file with the token that browsers have to show")


def recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FOLDER", help="copy them to this new folder")


def quickstart(parser: argparse.ArgumentParser) -> None:
    """It takes keys of its recipes alone."""


def doctor(parser: argparse.ArgumentParser) -> None:
    """It takes no words."""


# --- values ------------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 0 to 65535")
    return int(text)


def licence(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", text):
        raise argparse.ArgumentTypeError(f"{text} is not an identifier of a licence such as apache-2.0, mit or other")
    return text


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def sweep(text: str) -> tuple[str, list[str]]:
    """A decode key and its values, as they stand there."""
    key, _, values = text.partition("=")
    if not key or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is not a key with values such as entropy_bound=0.05,0.1,0.5")
    return key.removeprefix("decode."), values.split(",")


def thresholds(text: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not a list of thresholds such as 0.5,0.7,0.9,0.95")
    return values
