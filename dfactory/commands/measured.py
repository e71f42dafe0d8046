"""Records what `dfactory eval` found in the run folder of the checkpoint that it measured (runs/evaluations.jsonl).

Of a plain model directory nothing is recorded: it stays as it is.
"""

import argparse
import dataclasses
import datetime
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dfactory.console import plain_console
from dfactory.data.entries import entry_of
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import CheckpointError
from dfactory.redaction import shareable
from dfactory.runs.evaluations import checkpoint_of, record
from dfactory.runs.hashing import hash_file
from dfactory.runs.lineage import Evaluation, Result


def keep(arguments: argparse.Namespace, keys: DecodeKeys, results: Sequence[Result]) -> None:
    """Append the results, and say where. A folder that cannot be written costs the record, not the evaluation."""
    if (checkpoint := checkpoint_of(arguments.model)) is None:
        return
    try:
        file = record(checkpoint, _evaluation(arguments, keys, results))
    except CheckpointError as problem:
        plain_console(stderr=True).print(f"WARNING: the results are not recorded: {problem}", soft_wrap=True)
        return
    plain_console().print(f"recorded: {file}", soft_wrap=True)


def _evaluation(arguments: argparse.Namespace, keys: DecodeKeys, results: Sequence[Result]) -> Evaluation:
    entry = entry_of(arguments.data) if arguments.data else None
    file = Path(entry.path) if entry is not None and entry.path else None
    name = arguments.data if file is None else file.name
    return Evaluation(
        step=0,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=shlex.join(shareable(["dfactory", *arguments.typed])),
        data=name or ", ".join(arguments.task or arguments.lm_eval),
        sha256=hash_file(file).sha256 if file is not None else None,
        decode=stated(keys),
        results=list(results),
    )


def stated(keys: DecodeKeys) -> dict[str, Any]:
    """The decode keys that are not at their defaults, and those that name the rule and its dial."""
    default = DecodeKeys()
    changed = {name: value for name, value in vars(keys).items() if value != getattr(default, name)}
    return {"rule": keys.rule, "max_new_tokens": keys.max_new_tokens} | changed


def shares(name: str, hits: int, of: int, interval: tuple[float, float], part: str = "") -> Result:
    """A share of some records."""
    return Result(name, hits / of, part, *interval, records=of)


def parted(results: Iterable[Result], part: str) -> list[Result]:
    """The same numbers of a part of the questions."""
    return [dataclasses.replace(one, part=part) for one in results]
