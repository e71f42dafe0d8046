"""Secrets stay out of what dFactory writes for people: terminal and logs, tracebacks, config.yaml, reports.

A secret is the value of an environment variable, or of an option in a recipe, whose name says so, or text that looks like
one: a token of Hugging Face, OpenAI, GitHub or Weights & Biases, a password in a URL. All that goes through `redact`.
`guard_output` sends everything that Python prints through it, exceptions that nobody catches included; whoever writes a
file that holds a recipe or a message calls it himself.

Not seen: what native code writes to the file descriptors, values shorter than SHORTEST, parts of a secret, and text that
belongs to records or rollouts.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

MARK = "<redacted>"
SHORTEST = 8  # characters of a value: replacing "1" or "true" everywhere would hide all else

VARIABLE = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET)$|PASSWORD|PASSWD", re.IGNORECASE)  # names in the environment
OPTION = (
    r"(?:api|access|secret|private|auth)[_-]?key|secret|passw(?:or)?d|(?:api|access|auth|bearer|hf|wandb)[_-]?token"
)
OPTION_NAME = re.compile(rf"^token$|(?:^|[_-])(?:{OPTION})$", re.IGNORECASE)  # names in a recipe; a stop_token is none
SHAPES = re.compile(
    r"\b(?:hf_|gh[opsu]_|github_pat_|wandb_v1_)\w{16,}"
    r"|\bsk-(?=[\w-]*\d)[\w-]{16,}"
    r"|(?<=://)[^\s/:@]*:[^\s/@]+(?=@)"
    rf"|(?i:(?<=bearer )[\w.~+/=-]{{{SHORTEST},}})"
)
ASSIGNED = re.compile(rf"((?:{OPTION})[\"']?\s*[=:]\s*[\"']?)[^\s\"',;{{}}\[\]<>]{{{SHORTEST},}}", re.IGNORECASE)

_remembered: set[str] = set()


def redact(text: str) -> str:
    """The text with MARK in place of each secret in it."""
    known = tuple(sorted(_remembered.union(_in_environment()), key=len, reverse=True))
    if known:
        text = _any_of(known).sub(MARK, text)
    return ASSIGNED.sub(rf"\1{MARK}", SHAPES.sub(MARK, text))


def redacted(value: Any) -> Any:
    """The same for every string of nested dicts and lists; before they are written, because a writer may break lines."""
    if isinstance(value, dict):
        return {
            name: MARK if isinstance(inner, str) and inner and OPTION_NAME.search(str(name)) else redacted(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def remember(value: Any) -> None:
    """Take what nested dicts, lists and dataclasses hold under names of secrets as secrets of this process."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(inner, str) and len(inner) >= SHORTEST and OPTION_NAME.search(str(name)):
                _remembered.add(inner)
            remember(inner)
    elif isinstance(value, list):
        for inner in value:
            remember(inner)


def guard_output() -> None:
    """From now on this process prints no secret that it knows, wherever the text comes from."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not isinstance(stream.write, _GuardedWrite):
            stream.write = _GuardedWrite(stream.write)


class _GuardedWrite:
    """In the place of a stream's `write`, which print, logging, warnings, rich and the excepthook all call."""

    def __init__(self, write):
        self.write = write

    def __call__(self, text: str) -> int:
        self.write(redact(text))
        return len(text)


def _in_environment() -> Iterator[str]:
    values = (os.environ[name] for name in os.environ if _is_secret(name))
    return (value for value in values if len(value) >= SHORTEST)


@functools.cache
def _is_secret(variable: str) -> bool:
    return VARIABLE.search(variable) is not None


@functools.lru_cache(maxsize=8)
def _any_of(secrets: tuple[str, ...]) -> re.Pattern:
    """Also as Python, JSON and URLs spell them. Longest first: one may begin with another."""
    forms = {form for one in secrets for form in (one, repr(one)[1:-1], json.dumps(one)[1:-1], urllib.parse.quote(one))}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))))
