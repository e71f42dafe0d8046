"""Chat templates rendered within limits: they come with models from anywhere, and they are programs.

This is transformers' own sandboxed environment (its filters, globals and generation markers) with a budget. An
iteration costs STEP units, a call CALL, and each character or element that is touched or made one, charged before it
is made. A rendering may spend BASE, and SHARE for each character of its conversation: no honest template comes near,
and a hostile one ends within a second, at the same place on every machine. What draws at random (lipsum, random) is
left out, and the clock stands at DATE, because a resumed run has to see the same tokens.
"""

import datetime
import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

DATE = datetime.datetime(2024, 7, 26)  # the date that templates see as today; Llama 3.2's default without a clock
STEP, CALL = 64, 256  # units of an iteration, of a call
BASE, SHARE = 1 << 23, 32
LONGEST_TEMPLATE = 1 << 18  # characters
LONGEST_NUMBER = 4096  # bits
MOST_DIGITS = re.compile(r"\d{5}")  # of a width or precision in a format

_spending = threading.local()


class OverLimit(jinja2.TemplateError):
    """A template that takes too long, or makes too much."""


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # the characters between generation markers, on demand


def render(
    template: str,
    messages: list[dict],
    tools: list[dict] | None,
    *,
    add_generation_prompt: bool = False,
    spans: bool = False,
    variables: dict[str, Any],
) -> Rendered:
    """Render. Raises what the template raises, and OverLimit if it takes too long."""
    with _Budget(BASE + SHARE * (_weigh(messages) + _weigh(tools))):
        compiled = _compiled(template)
        plain, schemas, further = (
            chat_template_utils._plain_template_data(value) for value in (messages, tools, variables)
        )
        values = further | {"tools": schemas, "documents": None, "add_generation_prompt": add_generation_prompt}
        values["messages"] = chat_template_utils._alias_reasoning_fields(plain)
        if not spans:
            return Rendered(_join(compiled.generate(values)), [])
        blocks: list[str] = []
        found: list[tuple[int, int]] = []
        with compiled.environment.activate_tracker(blocks, found):
            for block in compiled.generate(values):
                blocks.append(block)
        return Rendered("".join(blocks), found)


def _join(blocks: Iterable[str]) -> str:
    return "".join(blocks)


class _Budget:
    """Units that one rendering may spend, in its thread."""

    def __init__(self, units: int):
        self.units = units

    def __enter__(self) -> None:
        self.before = getattr(_spending, "left", None)
        _spending.left = self.units

    def __exit__(self, *raised: object) -> None:
        _spending.left = self.before


def _spend(units: int) -> None:
    _spending.left -= units
    if _spending.left < 0:
        raise OverLimit("it makes too much, or goes on for too long")


def _size(value: Any) -> int:
    """Characters or elements, without what lies inside of them."""
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, range, set)) else 1


def _weigh(value: Any) -> int:
    """Characters of a value written out, about. It spends nothing, but it stops where the budget would."""
    most, total, waiting = getattr(_spending, "left", None), 0, [value]
    while waiting:
        item = waiting.pop()
        total += _size(item) + 2
        if isinstance(item, dict):
            waiting += item
            waiting += item.values()
        elif isinstance(item, (list, tuple, set, range)):
            waiting += item
        elif isinstance(item, int) and item.bit_length() > 64:
            total += item.bit_length() // 3
        if most is not None and total > most:
            _spend(total)
    return total


# --- what is charged where --------------------------------------------------------------------------------------------


@jinja2.pass_context  # with it, nothing of these is worked out while the template is compiled
def _metered(context, iterable: Iterable, cost: int) -> Iterator:
    """A loop's iterable; each iteration costs a step and the text of the loop's body."""
    for item in iterable:
        _spend(cost)
        yield item


@jinja2.pass_context
def _touched(context, value: Any) -> Any:
    _spend(_size(value))
    return value


@jinja2.pass_context
def _begun(context, value: str, cost: int) -> str:
    _spend(cost)
    return value


@jinja2.pass_context
def _concatenated(context, parts: list) -> str:
    """The operator ~."""
    _spend(sum(len(part) if isinstance(part, str) else _weigh(part) for part in parts))
    return "".join(map(str, parts))


def _finalize(value: Any) -> Any:
    """Of everything that is written."""
    _spend(len(value) if isinstance(value, str) else _weigh(value))
    return value


class _Metering(NodeTransformer):
    """Puts the charges into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        return self._with(node, iter=self._filter(node.iter, "_metered", STEP + _literal(node)))

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        begun = self._filter(nodes.Const("", lineno=node.lineno), "_begun", _literal(node))
        return self._with(node, body=[nodes.Output([begun], lineno=node.lineno), *node.body])

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                operand.expr = self._filter(operand.expr, "_touched")
        return self._with(node, expr=self._filter(node.expr, "_touched"))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        return self._with(node, node=self._filter(node.node, "_touched")) if isinstance(node.arg, nodes.Slice) else node

    @staticmethod
    def _with(node: nodes.Node, /, **changes: Any) -> nodes.Node:
        for name, value in changes.items():
            setattr(node, name, value)
        return node

    @staticmethod
    def _filter(node: nodes.Expr, name: str, *arguments: int) -> nodes.Filter:
        constants = [nodes.Const(value, lineno=node.lineno) for value in arguments]
        return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _literal(node: nodes.Node) -> int:
    """Characters of text in a part of a template."""
    return sum(len(text.data) for text in node.find_all(nodes.TemplateData))


# --- calls, operators, filters ----------------------------------------------------------------------------------------


def _format_size(pattern: str | bytes, values: Any) -> int:
    """At most so many characters does a format make. Raises OverLimit for wide fields."""
    shown = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    fields = shown.count("{") + shown.count("%")
    if MOST_DIGITS.search(shown) or re.search(r"\{[^}]*\{|%[^a-z%]*\*", shown):
        raise OverLimit("it formats a value to a width that is no text's")
    return len(shown) + fields * (10_000 + _weigh(values)) if fields else len(shown)


def _replaced_size(text: str | bytes, old: str | bytes = "", new: str | bytes = "", *count: Any) -> int:
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _of_texts(text: str | bytes, *values: Any, **named: Any) -> int:
    return _format_size(text, (values, named))


METHODS: dict[str, Callable[..., int]] = {  # of texts: the characters that they make
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), lambda text, width, *fill: len(text) + _length(width)),
    "expandtabs": lambda text, tabsize=8: len(text) * (1 + _length(tabsize)),
    "replace": _replaced_size,
    "join": lambda text, parts: _weigh(parts) + len(text) * _size(parts),
    **dict.fromkeys(("format", "format_map"), _of_texts),
}
FILTERS: dict[str, Callable[..., int]] = {  # of jinja, that make more than they get, or cost nothing; names are theirs
    "center": lambda value, width=80: _weigh(value) + _length(width),
    "indent": lambda s, width=4, *rest, **named: _weigh(s) + str(s).count("\n") * _length(width),
    "replace": lambda s, old, new, count=None: _replaced_size(str(s), str(old), str(new)),
    "join": lambda value, d="", attribute=None: _weigh(value) + len(str(d)) * _size(value),
    "format": lambda value, *values, **named: _format_size(str(value), (values, named)),
    "wordwrap": lambda s, width=79, long=True, wrapstring="\n", *rest, **named: (
        len(str(s)) * (1 + len(str(wrapstring)))
    ),
    "tojson": lambda x, ensure_ascii=False, indent=None, *rest, **named: 6 * _weigh(x) * (1 + _length(indent or 0)),
    **dict.fromkeys(("batch", "slice"), lambda value, count, *fill, **named: 8 * _size(value) + _length(count)),
    **dict.fromkeys(
        ("string", "pprint", "xmlattr", "urlize", "escape", "e", "forceescape"),
        lambda value, *rest, **named: 6 * _weigh(value),
    ),
    **dict.fromkeys(("length", "count", "first", "last", "default", "d"), lambda *values, **named: 1),
}


def _length(width: Any) -> int:
    """Of what fills a width: a number of characters, or themselves."""
    return len(width) if isinstance(width, str) else abs(int(width))


def _charged(name: str, work: Callable) -> Callable:
    """A filter that is paid for before it works. Lazy values become lists, each element paid for."""
    cost, skipped = FILTERS.get(name), hasattr(work, "jinja_pass_arg")

    @functools.wraps(work)
    def charged(*arguments: Any, **named: Any) -> Any:
        own = 1 if skipped else 0  # a context or an environment
        values = [_counted(value) if isinstance(value, Iterator) else value for value in arguments[own:]]
        _spend(STEP + (cost(*values, **named) if cost else 8 * sum(map(_size, (*values, *named.values())))))
        return work(*arguments[:own], *values, **named)

    return charged


def _counted(values: Iterator) -> list:
    return [item for item in values if _spend(STEP) is None]


class _Metered(ImmutableSandboxedEnvironment):
    """The environment of all templates."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metering().visit(super()._parse(source, name, filename))

    def call(self, context, function: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(function, LoopContext):  # a recursive loop goes into depth
            arguments = (_counted(iter(arguments[0])), *arguments[1:])
        arguments = tuple(_counted(value) if isinstance(value, Iterator) else value for value in arguments)
        _spend(CALL + self._cost(function, arguments, named))
        result = super().call(context, function, *arguments, **named)
        if isinstance(result, (str, bytes, list)):
            _spend(len(result))
        return result

    @staticmethod
    def _cost(function: Any, arguments: tuple, named: dict[str, Any]) -> int:
        values = (*arguments, *named.values())
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        name = getattr(function, "__name__", "")
        if isinstance(owner, (str, bytes)):
            return (
                METHODS[name](owner, *arguments, **named) if name in METHODS else len(owner) + sum(map(_size, values))
            )
        return sum(map(_size, values))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (
            isinstance(obj, (str, bytes)) and attr == "translate"
        )

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        _spend(self._operation_cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def _operation_cost(operator: str, left: Any, right: Any) -> int:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LONGEST_NUMBER:
                raise OverLimit(f"it makes a number of more than {LONGEST_NUMBER} bits")
            return 1
        if operator == "%" and isinstance(left, (str, bytes)):
            return _format_size(left, right)
        if operator == "*":
            sequence, count = (right, left) if isinstance(left, int) else (left, right)
            return _size(sequence) * max(count, 0) if isinstance(count, int) else 1
        return _size(left) + _size(right)


def _compiled(template: str) -> jinja2.Template:
    if len(template) > LONGEST_TEMPLATE:
        raise OverLimit(f"it has {len(template):,} characters, more than {LONGEST_TEMPLATE:,}")
    return _compile(template)


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> _Metered:
    theirs = chat_template_utils._compile_jinja_template("").environment
    trackers = [type(extension) for extension in theirs.extensions.values()]
    made = _Metered(
        trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks, extensions=trackers, finalize=_finalize
    )
    made.globals = {**theirs.globals, "strftime_now": DATE.strftime}
    del made.globals["lipsum"]
    made.filters = {name: _charged(name, work) for name, work in theirs.filters.items() if name != "random"}
    made.filters |= {"_metered": _metered, "_touched": _touched, "_begun": _begun, "_concatenated": _concatenated}
    return made
