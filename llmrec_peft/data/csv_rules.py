"""What the texts of a csv file stand for: one rule for training and serving, without Arrow.

A column is numeric only where that loses nothing: `0012`, `+5`, `0x1F`, `12E4` and whole numbers beyond 64 bits keep
their column text, since an article number is no quantity. Ids and titles are always text. So are dates and times, but
for `timestamp`.
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
"""Spellings of a missing value in a column of numbers or truths; in a column of texts each is a text as it stands."""

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
    """The character that separates the fields of a csv file, told from its header.

    It is a comma, unless the header has none and its names end at another of `DELIMITERS`.
    """
    if "," in header:
        return ","
    return next((sign for sign in DELIMITERS[1:] if sign in header), ",")


def typed_values(values: Sequence[str | None]) -> list[Any]:
    """The values of one column: whole numbers, truths or numbers if all but the missing ones are such, else texts."""
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
