"""Secrets stay out of what dFactory writes for people: terminal and logs, tracebacks, config.yaml, reports.

A value is a secret if its name says so, whatever its type: an environment variable, a recipe option, `name: value` in a
text. Text with the shape of a token, of a password in a URL or of a private key is a secret too. `redact` hides both.
`guard_output` sends everything that Python prints through it, uncaught exceptions included; code that writes a recipe or
a message to a file calls `redact` or `redacted` itself.

`shareable` hides more, for what leaves the machine with a model: where its files lie, and the hosts of addresses.

Not covered: what native code writes to file descriptors, values in running text shorter than SHORTEST, parts of a secret,
and the text of records and rollouts.
"""

import base64
import binascii
import dataclasses
import functools
import json
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "<redacted>"
SHORTEST = 8  # characters of a value: replacing "1" or "true" everywhere would hide ordinary text


def _set(words: str) -> frozenset[str]:
    return frozenset(re.findall("[a-z]+", words))


# The last word of a name decides; a number after it does not count (OPENAI_API_KEY_2).
ALWAYS = _set(
    "password passwords passwd pwd passphrase secret secrets credential credentials cookie cookies authorization bearer "
    "apikey apikeys apitoken accesskey accesstoken authkey authtoken secretkey privatekey auth pat"
)
ANYWHERE = ("password", "passwd", "passphrase", "credential", "apikey")  # in a variable: MYSQL_PASSWORD_FILE too
# `key`, `token` and `pass` are ordinary words here as well: a noise key, an end-of-text token, a forward pass.
ORDINARY_KEYS = _set(
    "answer any attention best block cache chosen column config content data date dedup dict field first foreign group "
    "hash head heads home id image index input instruction join kv label last layer lookup map mask message messages "
    "metric module name next noise num order other output partition primary prompt public qk query question random "
    "recipe record rejected response reward role row score seed shard sort source state system target text time tool "
    "tools tree unique value view"
)
SECRET_KEYS = _set("access api auth encryption judge private secret service signing ssh")
SECRET_TOKENS = _set(
    "access anthropic api auth aws azure bearer bot client cloud deploy gcp github gitlab google groq hf hub huggingface "
    "identity jwt judge login npm oauth openai personal private pypi ray refresh registry secret security server service "
    "session slack user wandb"
)
SECRET_PASSES = _set("admin db ftp http login mail mysql pg postgres proxy redis root smtp user")
ORDINARY_TOKENS = _set(
    "begin block bos cls end eos fill first image input last mask max min new next num output pad prompt response sep "
    "special start stop think total unk"
)
SWITCHES = _set("allow enable has is no require use")  # use_auth: true

SHAPES = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)"
    r"|(?<!\w)(?:"
    r"(?:hf_|gsk_)[A-Za-z0-9]{16,}|npm_[A-Za-z0-9]{36}|(?:gh[oprsu]_|github_pat_|wandb_v1_)\w{16,}"
    r"|(?:(?:sk|rk|pk)_(?:live|test)_|xai-|ya29\.)[\w-]{16,}"
    r"|(?<!-)sk-(?=[\w-]*\d)[\w-]{16,}"  # OpenAI, Anthropic; with a digit, because plain words follow `sk-` too
    r"|(?i:xox[a-z])-[\w-]{8,}|xapp-[\w-]{8,}|(?i:hooks\.slack\.com/services)/\w+/\w+/\w+"
    r"|gl[a-z]{2,12}-[\w.-]{20,}|GR1348941[\w-]{20,}"
    r"|AIza[\w-]{30,}|(?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[0-9A-Z]{16}"
    r"|(?<!-)eyJ[\w-]{8,}=*\.[\w-]{8,}=*(?:\.[\w.+/=-]*)?"  # a JSON web token
    r"|pypi-AgE[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|sq0csp-[\w\\-]{43}|AccountKey=[\w+/=]{40,}"
    r"|(?:AC|SK)[0-9a-z]{32}\b|\d{8,10}:[\w-]{35}|[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27}|[0-9a-z]{32}-us\d{1,2}\b"
    r")"
    r"|(?<=://)[^\s/:@]*:[^\s/@]+(?=@)"
    rf"|(?<=://)[^\s/:@]{{{SHORTEST},}}(?=@)"  # a token in place of a user name
    rf"|(?i:(?<=bearer )[\w.~+/=-]{{{SHORTEST},}})",
    re.DOTALL,
)
BASIC = re.compile(r"(?i:(?<=\bbasic ))[A-Za-z0-9+/]{8,}={0,2}")
NAMED = re.compile(r"(?<![\w.-])([A-Za-z_][\w.-]*+)([\"']?\s*+[=:]\s*+)")
VALUE = re.compile(  # after a name: a list, a mapping, something in quotes, or a word
    r"""\[(?P<list>[^\[\]]*)\] | \{(?P<mapping>[^{}]*)\} | "(?P<text>(?:[^"\\]|\\.)*)" | '(?P<quoted>(?:[^'\\]|\\.)*)'
        | (?:(?i:basic|bearer|digest|token)\s)?(?P<word>[^\s"',;{}\[\]<>]+)""",
    re.VERBOSE | re.DOTALL,
)
COOKIE = re.compile(r"(?i:\b((?:set-)?cookie[\"']?\s*+:\s*+[\"']?))[^\r\n\"']{8,}")

HOST = re.compile(r"(?<=://)[^\s/'\"]+")
PATH = re.compile(r"(?<![\w.~/<>:^-])(?:~|\.\.)?/(?:[\w.@+-]+/)+[\w.@+-]*")  # in a text: of two names at least
SPELT_AS_PATH = re.compile(r"(?:[~/]|\.\./|[A-Za-z]:\\)")

_remembered: set[str] = set()


def redact(text: str) -> str:
    """The text with each secret in it replaced by MARK."""
    known = tuple(sorted(_remembered.union(_in_environment()), key=len, reverse=True))
    if known:
        text = _any_of(known).sub(MARK, text)
    text = COOKIE.sub(rf"\1{MARK}", BASIC.sub(_without_credentials, SHAPES.sub(MARK, text)))
    return "".join(_without_values(text))


def redacted(value: Any) -> Any:
    """The same for nested mappings and lists. Call it before they are written, because a writer may break lines inside a
    secret. A value whose name says that it is secret is hidden whatever its type."""
    if isinstance(value, dict):
        return {
            redact(name) if isinstance(name, str) else name: MARK
            if is_secret_option(str(name)) and inner not in (None, "", [], {}, ())
            else redacted(inner)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(map(redacted, value)) if type(value) in (list, tuple) else [redacted(v) for v in value]
    return redact(value) if isinstance(value, str) else value


def shareable(value: Any) -> Any:
    """`redacted`, with paths of this machine relative to the working directory or by name, and addresses without host."""
    if isinstance(value, dict):
        return {name: shareable(inner) for name, inner in redacted(value).items()}
    if isinstance(value, list | tuple):
        return [shareable(inner) for inner in value]
    return _without_place(redact(value)) if isinstance(value, str) else value


def _without_place(text: str) -> str:
    text = HOST.sub(MARK, text)
    name, sign, path = text.partition("=")
    if sign and SPELT_AS_PATH.match(path) and " " not in name:
        return f"{name}={_by_name(path)}"
    return _by_name(text) if SPELT_AS_PATH.match(text) else PATH.sub(lambda found: _by_name(found[0]), text)


def _by_name(path: str) -> str:
    """A path as a stranger may read it."""
    here, spelt = Path.cwd(), Path(os.path.expanduser(path))
    below_home = here == Path.home() or not Path.home().is_relative_to(here)  # else the first names are those of users
    if spelt.is_absolute() and spelt.is_relative_to(here) and spelt != here and below_home and ".." not in spelt.parts:
        return str(spelt.relative_to(here))
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def remember(value: Any) -> None:
    """Register the secret values in nested mappings, lists and dataclasses, so that `redact` hides them anywhere."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            if is_secret_option(str(name)):
                _remembered.update(_parts(inner))
            remember(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            remember(inner)


def guard_output() -> None:
    """Redact everything that this process prints from now on."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not isinstance(stream.write, _GuardedWrite):
            stream.write = _GuardedWrite(stream.write)


class _GuardedWrite:
    """Replaces a stream's `write`, which print, logging, warnings, rich and the excepthook all call."""

    def __init__(self, write):
        self.write = write

    def __call__(self, text: str) -> int:
        self.write(redact(text))
        return len(text)


@functools.cache
def is_secret_option(name: str) -> bool:
    """Whether a recipe option with this name holds a secret: judge_key does, noise_key and eos_token do not."""
    *before, last = _words(name)
    if name == "PWD" or (before and before[0] in SWITCHES):  # PWD is the shell's working directory
        return False
    qualifier = before[-1] if before else ""
    return (
        last in ALWAYS
        or (last == "key" and bool(qualifier) and not qualifier.isdecimal() and qualifier not in ORDINARY_KEYS)
        or (last == "keys" and qualifier in SECRET_KEYS)
        or (last == "token" and not before)
        or (last in ("token", "tokens") and qualifier in SECRET_TOKENS)
        or (last == "pass" and (not before or qualifier in SECRET_PASSES))
    )


@functools.cache
def is_secret_variable(name: str) -> bool:
    """The same for an environment variable, where `key`, `token` and `pass` mean a secret far more often."""
    *before, last = _words(name)
    if is_secret_option(name) or any(word in name.lower() for word in ANYWHERE):
        return True
    return last in ("key", "keys", "token", "tokens", "pass") and not (before and before[-1] in ORDINARY_TOKENS)


def _words(name: str) -> list[str]:
    """The lower-case words of a name in any spelling, without trailing numbers: apiKey2 -> api, key. Never empty."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z0-9]+", " ", name)
    words = re.sub(r"[\s\d]+$", "", spaced).lower().split()
    return words or [""]


def _parts(value: Any) -> Iterator[str]:
    """The texts and numbers that a secret of any type consists of; short ones are left out."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _parts(inner)
    elif isinstance(value, (str, int, float)) and len(str(value)) >= SHORTEST:
        yield str(value)


def _without_values(text: str) -> Iterator[str]:
    """The text in pieces, with the value after each secret's name hidden. Values after other names are searched too."""
    done = at = 0
    while found := NAMED.search(text, at):
        at = found.end()
        if _names_secret(found) and (value := VALUE.match(text, at)) is not None:
            kind, end = value.lastgroup, value.end()
            if len(inner := value[kind]) >= SHORTEST and inner != MARK:
                yield text[done : value.start(kind)] + MARK
                done = value.end(kind)
            at = end
    yield text[done:]


def _names_secret(found: re.Match) -> bool:
    """Whether a match of NAMED names a secret. Prose does not: "unexpected token: ..."."""
    name, sign = found.groups()
    if (
        name in ("token", "pass")
        and "=" not in sign
        and re.match(r"\w ", found.string[max(found.start() - 2, 0) : found.start()])
    ):
        return False
    return is_secret_variable(name) if name.isupper() else is_secret_option(name.rpartition(".")[2])


def _without_credentials(found: re.Match) -> str:
    """Hide a word after `Basic` if it is base64 of `user:password`."""
    try:
        return MARK if b":" in base64.b64decode(found[0] + "=" * (-len(found[0]) % 4)) else found[0]
    except binascii.Error:
        return found[0]


def _in_environment() -> Iterator[str]:
    for name in os.environ:
        if is_secret_variable(name):
            value = os.environ[name]
            parts = {value, *re.split(r"[\s,;]+", value)} if len(value) >= SHORTEST else ()
            yield from (part for part in parts if len(part) >= SHORTEST)


@functools.lru_cache(maxsize=8)
def _any_of(secrets: tuple[str, ...]) -> re.Pattern:
    """A pattern of the secrets, also as Python, JSON and URLs spell them. Longest first: one may start with another."""
    forms = {form for one in secrets for form in (one, repr(one)[1:-1], json.dumps(one)[1:-1], urllib.parse.quote(one))}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))))
