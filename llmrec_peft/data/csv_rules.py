"""Types of csv columns, inferred by one rule for training and serving, without Arrow.

A column is numeric only if no value loses information: `0012`, `+5`, `0x1F`, `12E4` and whole numbers of more than 18
digits make their column text, since an article number is not a quantity. Ids and titles are always text. Dates and
times are text too, except in `timestamp`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

TEXTS = ("user_id", "item_id", "title")
"""Columns that are never typed."""
NULLS = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA", "NULL")
    + ("NaN", "n/a", "nan", "null", "None", "NaT", "<NA>", r"\N")
)
"""Spellings of a missing value in a numeric or boolean column; in a text column each is a text."""

WHOLE = r"0|-?[1-9][0-9]{0,17}"
TRUTH = r"true|True|TRUE|false|False|FALSE"
# At most 15 digits before the point, which a float holds exactly. An exponent has a sign, as Python writes it, or
# follows a fraction, as Java writes it; `12E4` alone is a code.
NUMBER = (
    r"-?(?:(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,25})?|\.[0-9]{1,25})(?:[eE][-+][0-9]{1,3})?"
    r"|-?[0-9]\.[0-9]{1,25}[eE][0-9]{1,3}|-?inf"
)
DELIMITERS = (",", ";", "\t", "|")


def delimiter_of(header: str) -> str:
    """The delimiter of a csv file, inferred from its header.

    It is a comma, unless the header has no comma and contains another of `DELIMITERS`.
    """
    if "," in header:
        return ","
    return next((sign for sign in DELIMITERS[1:] if sign in header), ",")


def typed_values(values: Sequence[str | None]) -> list[Any]:
    """The values of one column as integers, booleans or floats if all but the missing ones fit, else as texts."""
    texts = [(value or "").strip() for value in values]
    found = {text for text in texts if text not in NULLS}
    if not found:
        return [None] * len(texts) if not any(values) else list(values)
    converters: tuple[tuple[str, Callable[[str], Any]], ...] = ((WHOLE, int), (TRUTH, _truth), (NUMBER, float))
    for pattern, convert in converters:
        if all(re.fullmatch(pattern, text) for text in found):
            return [None if text in NULLS else convert(text) for text in texts]
    return list(values)


def _truth(text: str) -> bool:
    return text.lower() == "true"
