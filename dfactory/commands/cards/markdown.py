"""Text of others in Markdown: names, recipes and commands stay text, whatever they hold."""

import re
from typing import Any

from dfactory.runs.lineage import Records, Result

UNKNOWN = "unknown"


def code(text: Any) -> str:
    """On one line, as code, in a table too."""
    plain = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else UNKNOWN


def plain(text: Any) -> str:
    """On one line, without markup."""
    return re.sub(r"([\\`*_<>\[\]|#&])", r"\\\1", " ".join(str(text).split()))


def line(text: Any) -> str:
    """Of an indented block."""
    return " ".join(str(text).split())


def fenced(text: str) -> str:
    """A block of YAML, whose fence is longer than any in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def number(value: float | None) -> str:
    """A count."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def value(found: Any) -> str:
    """A measured number."""
    return f"{found:,.4f}" if isinstance(found, float) else UNKNOWN


def measured(result: Result) -> str:
    """A result with its interval."""
    known = result.low is not None and result.high is not None
    return value(result.value) + (f" ({value(result.low)} to {value(result.high)})" if known else "")


def time(seconds: float | None) -> str:
    """In the unit that a person would choose."""
    if seconds is None:
        return UNKNOWN
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def place(entry: Records) -> str:
    """Where on the hub records come from."""
    if not entry.on_hub:
        return ""
    parts = [f"{word} {code(text)}" for word, text in (("configuration", entry.config), ("split", entry.split)) if text]
    at = f"commit or branch {code(entry.revision)}" if entry.revision else "a commit that is unknown"
    return f" of the hub, {', '.join([*parts, at])}"


FILTERS = {one.__name__: one for one in (code, plain, line, fenced, number, value, measured, time, place)} | {
    "heading": plain
}
