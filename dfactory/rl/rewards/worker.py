"""One process that computes rewards, started by pool.py:

    python -m dfactory.rl.rewards.worker PARENT_PID SOCKET_FD

The socket brings the rewards to load and rows of the data to check, then one call after another (length and pickle); each
is answered by a line of JSON.
"""

import asyncio
import ctypes
import inspect
import json
import math
import numbers
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from dfactory.errors import ConfigError
from dfactory.redaction import guard_output, redact, remember
from dfactory.rl.rewards.specs import RewardSpec, load_reward, required_columns, row_problem, taken

LENGTH = struct.Struct("<Q")
PR_SET_PDEATHSIG = 1


def main(parent: int, channel: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # holds even where a reward never gives control back
    if os.getppid() != parent:
        return
    os.set_inheritable(channel, False)
    guard_output()
    with socket.socket(fileno=channel) as connection, connection.makefile("rwb") as stream:
        specs, rows = read_message(stream)
        for spec in specs:
            remember(spec.options)
        try:
            functions = [load(spec) for spec in specs]
            check_rows(specs, functions, rows)
        except ConfigError as problem:
            reply(stream, {"failed": str(problem)})
            return
        reply(stream, {"needs": {spec.name: required_columns(f) for spec, f in zip(specs, functions, strict=True)}})
        while (task := read_message(stream)) is not None:
            index, arguments = task
            columns = {name: value for name, value in arguments.items() if name not in specs[index].options}
            reply(stream, score(functions[index], columns) | {"memory_mb": memory_mb()})


def load(spec: RewardSpec) -> Callable:
    try:
        return load_reward(spec)
    except ConfigError:
        raise
    except Exception as problem:  # a user's module may raise anything on import
        raise ConfigError(f"reward {spec.target} cannot be imported: {last_line(problem)}") from problem


def check_rows(specs: list[RewardSpec], functions: list[Callable], rows: list[tuple[str, dict]]) -> None:
    """Raises ConfigError for the first row, as (file:line, columns), that a reward cannot score."""
    for spec, function in zip(specs, functions, strict=True):
        for origin, row in rows:
            if problem := row_problem(spec, function, row):
                raise ConfigError(f"{origin}: {problem}")


def read_message(stream: BinaryIO) -> Any:
    """The next message; None when the pool has closed the pipe."""
    header = stream.read(LENGTH.size)
    return pickle.loads(stream.read(*LENGTH.unpack(header))) if len(header) == LENGTH.size else None


def reply(stream: BinaryIO, message: dict) -> None:
    stream.write(json.dumps(message, default=str).encode() + b"\n")
    stream.flush()


def score(function: Callable, arguments: dict[str, Any]) -> dict:
    """Call a reward. {"scores": [[outcome, value], ...]} or {"outcome", "message"}, and what it logged."""
    metrics: list[tuple[str, float]] = []
    extra: dict[str, list] = {}
    logging = {
        "log_metric": lambda name, value: metrics.append((name, float(value))),
        "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
    }
    try:
        returned = function(**taken(function, arguments | logging))
        if inspect.isawaitable(returned):
            returned = asyncio.run(returned)
        values = list(returned)
    except Exception as problem:  # whatever a user's function raises is counted, never a score
        return {"outcome": "error", "message": last_line(problem)}
    count = len(arguments["completions"])
    if len(values) != count:
        return {"outcome": "wrong_length", "message": f"{len(values)} rewards for {count} completions"}
    return {"scores": [to_score(value) for value in values], "metrics": metrics, "extra": extra}


def to_score(value: Any) -> tuple[str, float | None]:
    if value is None:
        return "unscored", None
    if hasattr(value, "item") and not isinstance(value, numbers.Real):  # a scalar array or tensor
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return "ok", float(value)
    return "not_a_number", None


def last_line(problem: Exception) -> str:
    """`reward.py:12: ValueError: ...`: where it was raised, and the traceback's last line."""
    place = traceback.extract_tb(problem.__traceback__)[-1]
    text = redact(traceback.format_exception_only(problem)[-1].strip())
    return f"{os.path.basename(place.filename)}:{place.lineno}: {text}"


def memory_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
