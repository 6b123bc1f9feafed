"""One value of a column as plain Python, from a table, a request or the items of an exported student.

Without Arrow. `rendering.render` (training) and `templates.fill` (serving) both convert values by `plain`, so that a
value becomes the same text in both.
"""

import datetime
from decimal import Decimal
from typing import Any

import numpy as np

from llmrec_peft.documents import has_surrogates
from llmrec_peft.errors import DataError, DomainError
from llmrec_peft.messages import quoted

MAX_BITS = 64
"""Bits of a whole number, at most: what a table can hold."""
_TIMES = datetime.date | datetime.time | datetime.timedelta


def replace_surrogates(text: str) -> str:
    """The text with each half of a surrogate pair replaced by U+FFFD; two halves that fit become their character.

    JSON can spell half a pair by an escape; Arrow, tokenizers and UTF-8 cannot hold one.
    """
    if text.isascii() or not has_surrogates(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def plain(name: str, value: Any) -> Any:
    """A value of the column `name` as None, bool, int, float, Decimal, str, a date or time, or a list of these.

    NaN and NaT are None: pandas writes them where a value is missing. Halves of surrogate pairs are replaced. NumPy's
    float32 and float16 stay what they are, since they print shorter: 2.55, not 2.549999952316284.

    Raises:
        DataError: a number that is infinite, or beyond 64 bits.
        DomainError: any other kind of value, such as a mapping, bytes, or a list in a list.
    """
    if isinstance(value, np.ndarray):
        value = list(value) if value.ndim else value.item()
    if isinstance(value, list | tuple):
        return [_one(name, part) for part in value]
    return _one(name, value)


def value_key(value: Any) -> tuple[str, str]:
    """A key that distinguishes plain values: 1 from "1" and True."""
    return (type(value).__name__, repr(value))


def _one(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = _unboxed(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return replace_surrogates(str.__str__(value))
    if isinstance(value, int):
        if int(value).bit_length() > MAX_BITS:
            raise DataError(
                f"column {name!r} has {quoted(value)}, a whole number of more than {MAX_BITS} bits; write it as a text"
            )
        return int(value)
    if isinstance(value, float | np.floating | Decimal):
        return _number(name, value)
    if isinstance(value, _TIMES):
        return value if value == value else None  # NaT differs from itself
    raise DomainError(
        f"column {name!r} names {quoted(value)}, a {type(value).__name__}; flatten it to texts, numbers or a list of "
        "these first"
    )


def _number(name: str, value: Any) -> Any:
    if value.is_nan() if isinstance(value, Decimal) else np.isnan(value):
        return None
    if value.is_infinite() if isinstance(value, Decimal) else np.isinf(value):
        raise DataError(f"column {name!r} has the number {value}; give a finite number, or leave it empty")
    if isinstance(value, Decimal):
        return value
    return float(value) + 0.0 if isinstance(value, float) else value + type(value)(0)  # -0.0 becomes 0.0


def _unboxed(value: np.generic) -> Any:
    """A NumPy scalar as Python has it; float32 and float16 stay."""
    if isinstance(value, np.datetime64 | np.timedelta64):
        unit = "datetime64[us]" if isinstance(value, np.datetime64) else "timedelta64[us]"
        return value.astype(unit).item()
    return value if isinstance(value, np.float32 | np.float16) else value.item()
