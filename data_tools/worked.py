"""Worked solutions of reasoning-gym's problems: short lines that a small model can copy, one operation each.

12 + 30 - 7  ->  12 + 30 = 42
                 42 - 7 = 35

11:24:08 to 14:55:05  ->  Seconds: 5 - 8 + 60 = 57, borrow 1
                          Minutes: 55 - 24 - 1 = 30
                          Hours: 14 - 11 = 3
"""

import calendar
import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

UNITS = {  # name -> (how many make one of the next, how it is read from a moment)
    "Milliseconds": (1000, lambda moment: moment.microsecond // 1000),
    "Seconds": (60, lambda moment: moment.second),
    "Minutes": (60, lambda moment: moment.minute),
    "Hours": (24, lambda moment: moment.hour),
}


class Column(NamedTuple):
    """One unit of a subtraction: its line, its digits, and what it takes from the next unit."""

    line: str
    value: int
    borrowed: int


def running_sums(expression: str) -> str:
    """`a + b - c` as one line for each operation, from left to right."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{before} {sign} {term} = {total}")
    return "\n".join(lines)


def interval(start: datetime, end: datetime, units: Sequence[str], days: bool = False) -> tuple[str, list[int]]:
    """The lines from `start` to `end`, and the numbers that they end in: days if wanted, then the units, largest first.

    In the lines the smallest unit comes first, so that each needs only what stands above it. Time zones count as hours.
    """
    lines, values, borrowed = [], [], 0
    zone = zone_hours(start) - zone_hours(end)
    if zone:
        lines.append(f"Zones: {zone_hours(start)} - {zone_hours(end)} = {zone}".replace("- -", "+ "))
    for name in reversed(units):
        size, read = UNITS[name]
        last = name == units[0] and not days
        column = subtract(
            name, read(end), read(start), borrowed, zone if name == "Hours" else 0, None if last else size
        )
        lines.append(column.line)
        values.insert(0, column.value)
        borrowed = column.borrowed
    if days:
        counted, total = count_days(start, end)
        lines += counted
        if borrowed:
            lines.append(f"Days: {total}{signed(-borrowed)} = {total - borrowed}")
        values.insert(0, total - borrowed)
    return "\n".join(lines), values


def subtract(name: str, after: int, before: int, borrowed: int, further: int, size: int | None) -> Column:
    """`after - before - borrowed + further`, brought into 0 .. size - 1 by whole `size`s from the next unit."""
    value = after - before - borrowed + further
    wraps = 0 if size is None else -(value // size)
    terms = f"{after} - {before}" + "".join(map(signed, (-borrowed, further, wraps * (size or 0))))
    line = f"{name}: {terms} = {value + wraps * (size or 0)}"
    if wraps:
        line += f", borrow {wraps}" if wraps > 0 else f", carry {-wraps}"
    return Column(line, value + wraps * (size or 0), wraps)


def count_days(start: datetime, end: datetime) -> tuple[list[str], int]:
    """Days between two dates, month after month: what is left of the first, the whole ones, what is used of the last."""
    months = list(itertools.takewhile(lambda month: month <= (end.year, end.month), months_from(start)))
    if len(months) == 1:
        total = end.day - start.day
        return [f"{calendar.month_name[start.month]}: {end.day} - {start.day} = {total}"], total
    (year, month), *rest = months
    length = calendar.monthrange(year, month)[1]
    total = length - start.day
    lines = [f"{calendar.month_name[month]}: {length} - {start.day} = {total}"]
    for year, month in rest:
        more = end.day if (year, month) == (end.year, end.month) else calendar.monthrange(year, month)[1]
        lines.append(f"{calendar.month_name[month]}: {total} + {more} = {total + more}")
        total += more
    return lines, total


def months_from(start: datetime) -> Iterator[tuple[int, int]]:
    for index in itertools.count(start.year * 12 + start.month - 1):
        yield index // 12, index % 12 + 1


def zone_hours(moment: datetime) -> int:
    offset = moment.utcoffset()
    return 0 if offset is None else round(offset.total_seconds() / 3600)


def signed(number: int) -> str:
    """A further term of a sum; nothing for 0."""
    return "" if not number else f" + {number}" if number > 0 else f" - {-number}"
