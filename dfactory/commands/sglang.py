"""`dfactory export --sglang`: the two files that SGLang serves a diffusion model with, by the recipe's decode keys.

    sglang.yaml      what --dllm-algorithm-config takes: thresholds, block size
    sglang.sh        the launch line, with --dllm-algorithm

What SGLang does was read in its version 0.5.23: srt/dllm/config.py and srt/dllm/algorithm/. Neither file has been run here,
because SGLang needs a GPU, and both say so.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dfactory.commands.cards.usage import IDS, recipe_keys
from dfactory.decoding.keys import DecodeKeys, decode_keys_over, rule_of
from dfactory.decoding.rules.base import Served
from dfactory.errors import ConfigError
from dfactory.models.families.base import FAMILIES, InSGLang
from dfactory.models.registry import trained_block_size
from dfactory.runs.lineage import Lineage
from dfactory.vocabulary import read_vocabulary

VERSION = "0.5.23"
CONFIG, LAUNCH = "sglang.yaml", "sglang.sh"
NOT_RUN = f"Written by dfactory export for SGLang {VERSION}. Not run: SGLang needs a GPU, and there was none."


def write_sglang(directory: Path, lineage: Lineage) -> str:
    """Write the two files into a model directory; the line that says so.

    Raises ConfigError for an architecture that SGLang has no diffusion decoder for, another mask than it takes, or a
    decoding rule that it has not.
    """
    known = _require_known(directory, recipe_keys(lineage))
    keys = decode_keys_of(lineage)
    served = _require_served(keys)
    block_size = trained_block_size(directory)
    config = dict(served.config) | ({} if known.mask is None else {"block_size": block_size})
    (directory / CONFIG).write_text(f"# {NOT_RUN}\n{yaml.safe_dump(config, sort_keys=False)}")
    launch = directory / LAUNCH
    launch.write_text(launch_script(served.algorithm))
    launch.chmod(0o755)
    told = ", ".join(f"{name} {value}" for name, value in config.items())
    return f"SGLang: {LAUNCH} with {served.algorithm} ({told}), not run here"


def launch_script(algorithm: str) -> str:
    """Serves the directory that it lies in; further words go to SGLang."""
    return f"""#!/bin/sh
# {NOT_RUN}
here=$(cd "$(dirname "$0")" && pwd)
exec python -m sglang.launch_server --model-path "$here" --trust-remote-code --host 127.0.0.1 \\
    --dllm-algorithm {algorithm} --dllm-algorithm-config "$here/{CONFIG}" "$@"
"""


def decode_keys_of(lineage: Lineage) -> DecodeKeys:
    """Those of the recipe of the last training, else the defaults."""
    stated: Any = recipe_keys(lineage).get("decode") or {}
    known = {field.name for field in dataclasses.fields(DecodeKeys)} - set(IDS)
    return decode_keys_over(DecodeKeys(), {k: v for k, v in stated.items() if k in known}, "the recipe")


def _require_known(directory: Path, recipe: Mapping[str, Any]) -> InSGLang:
    config = json.loads((directory / "config.json").read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    decoded = {v.in_sglang.architecture: v.in_sglang for f in FAMILIES for v in f.variants if v.in_sglang is not None}
    if architecture not in decoded:
        raise ConfigError(
            f"--sglang: SGLang {VERSION} decodes no diffusion model of the architecture {architecture}, only "
            f"{', '.join(decoded)}; leave --sglang out, and serve it with `dfactory serve`"
        )
    known = decoded[architecture]
    if known.mask is None:
        return known
    mask = read_vocabulary(directory, **{name: recipe.get(name) for name in IDS}).special.mask
    if mask != known.mask:
        raise ConfigError(
            f"--sglang: SGLang {VERSION} takes {known.mask} for the mask of {architecture}, and this model's is "
            f"{mask}; leave --sglang out, and serve it with `dfactory serve`"
        )
    return known


def _require_served(keys: DecodeKeys) -> Served:
    rule = rule_of(keys)
    served = rule.in_sglang(keys.editing_threshold, keys.max_post_steps)
    if served is None:
        raise ConfigError(
            f"--sglang: SGLang {VERSION} has no algorithm for {rule.selector} with the recipe's keys; leave --sglang out, "
            "and serve the model with `dfactory serve`"
        )
    return served
