"""Rows -> lines of JSON that our own reader reads, whatever a parquet file held.

date, time, moment   ISO 8601 text        timedelta   seconds
Decimal              a number where a float holds it exactly, else its digits as text
bytes                base64 text          NaN, infinite   null: JSON has no such number
"""

import base64
import datetime
import decimal
import json
import math
from collections import Counter
from typing import Any

from dfactory.errors import DataError


class Changes:
    """Counts of the values that a line of JSON cannot give back, by column; `str()` tells them."""

    def __init__(self) -> None:
        self.base64: Counter[str] = Counter()
        self.null: Counter[str] = Counter()

    def __str__(self) -> str:
        kinds = ((self.base64, "bytes", "base64"), (self.null, "NaN or infinite", "null"))
        return "; ".join(
            f"{name}: {', '.join(f'{count:,} of {column}' for column, count in counts.items())}; written as {form}"
            for counts, name, form in kinds
            if counts
        )


def json_line(row: Any, changes: Changes | None = None) -> bytes:
    """One line with its end. Raises DataError that names the column of a value without a form in JSON."""
    text = json_text(row, changes)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half a character, which only an escape can spell
        return f"{json.dumps(json.loads(text))}\n".encode()


def json_text(value: Any, changes: Changes | None = None) -> str:
    """A value as JSON, without its end of line."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_object(value, changes or Changes()), ensure_ascii=False, allow_nan=False)


def _object(row: Any, changes: Changes) -> Any:
    if not isinstance(row, dict):
        return plain_value(row, "of the row", changes)
    return {str(name): plain_value(value, str(name), changes) for name, value in row.items()}


def plain_value(value: Any, column: str, changes: Changes) -> Any:
    """The value as JSON types; `column` is where it stands, for messages. Raises DataError for a type without a form."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        changes.null[column] += 1
        return None
    if isinstance(value, dict):
        return {str(key): plain_value(inner, column, changes) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(inner, column, changes) for inner in value]
    if isinstance(value, bytes):
        changes.base64[column] += 1
        return base64.b64encode(value).decode()
    return _scalar(value, column)


def _scalar(value: Any, column: str) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return float(value) if value.is_finite() and decimal.Decimal(repr(float(value))) == value else str(value)
    raise DataError(
        f"column {column} holds a {type(value).__name__}, which has no form in JSON: write .parquet, or remove the column"
    )
