"""Numbers, cells and tables of the report, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmrec_peft.evaluation.bootstrap import Interval


def number(value: float, sign: bool = False) -> str:
    """Four decimals, "undefined" for NaN; `sign` for differences."""
    if math.isnan(value):
        return "undefined"
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def interval_range(found: Interval, sign: bool = False) -> str:
    if math.isnan(found.low):
        return ""
    return f" [{number(found.low, sign)}, {number(found.high, sign)}]"


def number_with_range(found: Interval, sign: bool = False) -> str:
    return number(found.value, sign) + interval_range(found, sign)


def key_value_table(entries: Mapping[str, Any]) -> str:
    return table(["", ""], [[cell(name), value_cell(value)] for name, value in entries.items()])


def value_cell(value: Any) -> str:
    """A fact's value: yes or no, a number with a few digits, or text."""
    if isinstance(value, (bool, np.bool_)) or value is None:
        return "none" if value is None else "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        real = float(value)
        return f"{real:,.1f}" if abs(real) >= 100 else f"{real:.4g}"
    return cell(value)


def cell(value: Any) -> str:
    """Text of a table cell or heading: on one line, with what Markdown would read as syntax escaped."""
    text = " ".join(str(value).split())
    for character in "\\|`<*":
        text = text.replace(character, "\\" + character)
    return text


def words(name: str) -> str:
    return cell(name.replace("_", " "))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + " --- |" * len(head))
    return "\n".join(lines)
