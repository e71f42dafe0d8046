"""The words that every verb and data tool with a model takes. Light, because parsers are built before anything is read."""

import argparse
from typing import Any

from dfactory.config.words import MODEL_HELP

OF_A_MODEL = ("model", "dtype", "device", "init_weights")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What a Pipeline is loaded from."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--init-weights", default="pretrained", choices=("pretrained", "random"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's"
    )
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")


def model_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a Pipeline that these words state."""
    return {name: getattr(arguments, name) for name in OF_A_MODEL}
