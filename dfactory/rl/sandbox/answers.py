"""What a program in the sandbox answers, and whether that is what was expected. Nothing here runs anything of the program's.

An answer is JSON as runner.py encodes values: what JSON lacks is an object with one key, its kind.
"""

import math
from dataclasses import dataclass
from typing import Any

DEEPEST = 100  # the runner nests no deeper; a program that writes to the channel itself might
MOST_PAIRS = 100_000  # of items without an order, to be compared within a tolerance


@dataclass(frozen=True)
class Answer:
    """What came back: a value as JSON, or the name of an exception."""

    value: Any = None
    error: str | None = None

    def equals(self, expected: Any, tolerance: float = 0.0) -> bool:
        return self.error is None and same(self.value, expected, tolerance)


def same(answer: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Is the answer, as JSON, equal to a plain value? Python's equality, on values only, never on the program's objects.

    Numbers are equal across int, float and bool, floats within a relative and absolute tolerance; tuples are lists; nan
    equals nothing. The work is bounded by the size of `expected`.
    """
    if isinstance(expected, (bool, int, float)):
        number = _number(answer)
        close = tolerance > 0 and isinstance(number, (int, float)) and _close(number, expected, tolerance)
        return number is not None and (number == expected or close)
    if expected is None or isinstance(expected, str):
        return type(answer) is type(expected) and answer == expected
    if isinstance(expected, (list, tuple)):
        if not isinstance(answer, list) or len(answer) != len(expected):
            return False
        return all(same(a, e, tolerance) for a, e in zip(answer, expected, strict=True))
    if isinstance(expected, (set, frozenset)):
        return _same_items(_tagged(answer, "set"), [[item] for item in expected], tolerance, wrap=True)
    if isinstance(expected, dict):
        return _same_items(_tagged(answer, "dict"), [[k, v] for k, v in expected.items()], tolerance)
    if isinstance(expected, bytes):
        return _tagged(answer, "bytes") == expected.hex()
    if isinstance(expected, complex):
        return same(_tagged(answer, "complex"), [expected.real, expected.imag], tolerance)
    raise TypeError(f"an expected value of type {type(expected).__name__} is no plain value: {expected!r}")


def _same_items(answer: Any, expected: list, tolerance: float, wrap: bool = False) -> bool:
    """Items without an order: as many, and each expected one is among them."""
    if not isinstance(answer, list) or len(answer) != len(expected):
        return False
    items = [[item] for item in answer] if wrap else answer
    found = {key for item in items if (key := _answer_key(item, DEEPEST)) is not None}
    missing = [item for item in expected if _value_key(item) not in found]
    if not missing or tolerance == 0:
        return not missing
    if len(missing) * len(items) > MOST_PAIRS:
        return False
    return all(any(same(item, wanted, tolerance) for item in items) for wanted in missing)


def _answer_key(answer: Any, depth: int) -> str | None:
    """A text that two answers share if they are equal; None for what equals nothing. Text, because a program that chooses
    numbers can make their hashes collide."""
    if depth == 0:
        return None
    if answer is None or isinstance(answer, str):
        return _plain_key(answer)
    if (number := _number(answer)) is not None:
        return _plain_key(number)
    if isinstance(answer, list):
        return _list_key([_answer_key(item, depth - 1) for item in answer])
    for kind in ("set", "dict"):
        if isinstance(items := _tagged(answer, kind), list):
            keys = [_answer_key(item, depth - 1) for item in items]
            return None if None in keys else f"{kind}{_list_key(sorted(set(keys)))}"
    if isinstance(text := _tagged(answer, "bytes"), str):
        return f"b{len(text)}:{text}"
    if isinstance(parts := _tagged(answer, "complex"), list) and len(parts) == 2:
        return _complex_key(*(_answer_key(part, depth - 1) for part in parts))
    return None


def _value_key(value: Any) -> str | None:
    """The same of a plain value."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return _plain_key(value)
    if isinstance(value, (list, tuple)):
        return _list_key([_value_key(item) for item in value])
    if isinstance(value, (set, frozenset)):
        return f"set{_list_key(sorted(map(str, map(_value_key, value))))}"
    if isinstance(value, dict):
        return f"dict{_list_key(sorted(str(_value_key([k, v])) for k, v in value.items()))}"
    if isinstance(value, bytes):
        return f"b{2 * len(value)}:{value.hex()}"
    if isinstance(value, complex):
        return _complex_key(_value_key(value.real), _value_key(value.imag))
    raise TypeError(f"an expected value of type {type(value).__name__} is no plain value: {value!r}")


def _plain_key(value: str | float | None) -> str | None:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"s{len(value)}:{value}"
    if value != value:
        return None
    whole = isinstance(value, int) or value.is_integer()
    return f"i{int(value):x}" if whole else f"f{value.hex()}"


def _list_key(keys: list[str | None]) -> str | None:
    return None if None in keys else f"[{','.join(keys)}]"


def _complex_key(real: str | None, imaginary: str | None) -> str | None:
    return None if real is None or imaginary is None else f"c{real},{imaginary}"


def _number(answer: Any) -> int | float | None:
    if isinstance(answer, (bool, int, float)):
        return answer
    try:
        if isinstance(text := _tagged(answer, "int"), str):
            return int(text, 16)
        if isinstance(text := _tagged(answer, "float"), str):
            return float(text)
    except ValueError:
        return None
    return None


def _close(number: float, expected: float, tolerance: float) -> bool:
    try:
        return math.isclose(number, expected, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an int beyond floats
        return False


def _tagged(answer: Any, kind: str) -> Any:
    """The content of {"kind": content}, else None."""
    return answer[kind] if isinstance(answer, dict) and answer.keys() == {kind} else None
