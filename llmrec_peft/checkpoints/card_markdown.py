"""Pieces of Markdown for model cards: code marks, tables, numbers.

Domains and labels are other people's text. A card has them only as Python spells them (`repr`, which leaves no line
break and nothing invisible), inside code marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def code(value: Any, *, bare: bool = False) -> str:
    """A value in code marks, as Python spells it; `bare` leaves the quotes of a text out."""
    text = repr(value)
    text = text[1:-1] if bare and isinstance(value, str) else text
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    marks = "`" * (longest + 1)
    return f"{marks}{pad}{text or ' '}{pad}{marks}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def python_block(lines: Iterable[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def number_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"
    return "" if value is None else f"{value:,}" if is_number(value) else code(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def one_line(text: Any) -> str:
    """A text as one short line of what can be seen, for the YAML block."""
    text = "".join(sign if sign.isprintable() else " " for sign in str(text))
    return " ".join(text.split())[:80]
