"""Templates of events and headers, filled for one row without Arrow; `rendering` fills them for many rows."""

import re
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmrec_peft.data.values import plain, replace_surrogates
from llmrec_peft.documents import has_surrogates
from llmrec_peft.errors import DomainError
from llmrec_peft.messages import quoted

OUTCOME_COLUMNS = ("label", "rating", "behaviour")
"""Columns of interactions that tell an outcome; no template may show them."""
MAX_TEMPLATE, MAX_FIELDS = 100_000, 200
"""Characters and fields of a template, at most."""
MAX_WIDTH, MAX_SPEC = 1_000, 100
"""Largest number in a format, such as its width, and characters of a format, at most."""

# Characters that end a line or are invisible in one; a run of them becomes one space.
_BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b\u2028\u2029\ufeff]+")


def check_template(template: str, what: str) -> None:
    """Raise DomainError unless a template has only plain column names and formats of a bounded size.

    Args:
        template: text with {column} or {column:format} fields.
        what: name of the template in messages.
    """
    if len(template) > MAX_TEMPLATE:
        raise DomainError(f"{what} has {len(template):,} characters, and {MAX_TEMPLATE:,} are the most; shorten it")
    if has_surrogates(template):
        raise DomainError(f"{what} holds half of a surrogate pair, which is not a character; remove it")
    try:
        parts = string.Formatter().parse(template)
        fields = [(name, spec or "", turned) for _, name, spec, turned in parts if name is not None]
    except ValueError as error:
        raise DomainError(f"{what} is not a template ({error}); write {{{{ for a brace") from None
    if len(fields) > MAX_FIELDS:
        raise DomainError(f"{what} has {len(fields)} fields, and {MAX_FIELDS} are the most; use fewer")
    for name, spec, turned in fields:
        if not name.isidentifier() or turned:
            shown = quoted(name + (f"!{turned}" if turned else ""))[1:-1]
            raise DomainError(f"{what} has the field {{{shown}}}; fields are column names, such as {{title}}")
        sizes = [number for number in re.findall(r"\d+", spec) if len(number) > 9 or int(number) > MAX_WIDTH]
        if sizes or len(spec) > MAX_SPEC or "{" in spec:
            rule = (
                "no field inside" if "{" in spec else f"no number above {MAX_WIDTH} and at most {MAX_SPEC} characters"
            )
            raise DomainError(
                f"{what} has the format {quoted(spec)} of {{{name}}}; a format has {rule}; write it as in {{price:.2f}}"
            )


def template_columns(template: str) -> list[str]:
    """Names in braces of a template, each once, in order."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return list(dict.fromkeys(names))


def template_literals(template: str) -> list[str]:
    """Fixed texts of a template, in order."""
    return [literal for literal, _, _, _ in string.Formatter().parse(template) if literal]


def neutralise(text: str, forbidden: list[str]) -> str:
    """A column's value as plain data: one line, without any text that has a meaning in a stream.

    Line breaks and control characters become one space, half a surrogate pair becomes U+FFFD. A space is inserted into
    each forbidden text (a single character is replaced by a space). This repeats until none is left, since breaking up
    one can form another.
    """
    return broken_up(_BREAKS.sub(" ", replace_surrogates(text)).strip(), forbidden)


def broken_up(text: str, forbidden: list[str]) -> str:
    """A text with a space inserted into each forbidden word."""
    # With a space at its edge a text could never be broken up.
    forbidden = [word.strip() for word in forbidden if word.strip()]
    while any(word in text for word in forbidden):
        for word in forbidden:
            text = text.replace(word, word[0] + " " + word[1:] if len(word) > 1 else " ")
    return text


def fill(template: str, columns: Mapping[str, Any], forbidden: list[str]) -> str:
    """Fill a template for one row, as `rendering.render` does for many.

    Args:
        template: text with {column} or {column:format} fields.
        columns: a Python value for each field, see `values.plain`; None and NaN become the empty text, and a list its
            parts with commas.
        forbidden: see :func:`neutralise`.

    Raises:
        DomainError: a format that does not fit its value, or a value that is not a text, number, date or list of these.
        DataError: a number that is infinite or beyond 64 bits.
    """
    parts = []
    for literal, name, spec, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(value_text(name, columns[name], spec or "", forbidden))
    text = "".join(parts)
    literals = template_literals(template)
    # Two harmless values side by side can still form a forbidden text: "-" and ">". Forbidden texts in the template's
    # own literals, such as a chat's special tokens, are intended.
    for word in forbidden:
        if text.count(word) > sum(literal.count(word) for literal in literals):
            text = broken_up(text, forbidden)
    return text


def value_text(name: str, value: Any, spec: str, forbidden: list[str], column: str = "") -> str:
    """One value of the column `name`, formatted and neutralised, for both `fill` and `render`.

    Args:
        column: description of the column that messages put before the value.
    """
    value = plain(name, value)
    if isinstance(value, list):
        texts = [part_text(part) for part in value]
        known = [text for text in texts if text is not None]
        value = ", ".join(known) if len(known) == len(texts) else None
    if value is None:
        return ""
    try:
        return neutralise(format(value, spec) if spec else str(value), forbidden)
    except (ValueError, TypeError, OverflowError) as error:
        raise DomainError(
            f"field {{{name}:{spec}}} does not fit the {column}value {quoted(value)} ({error}); correct the format"
        ) from None


def part_text(part: Any) -> str | None:
    """A plain value of a list as text; None if it is missing."""
    if isinstance(part, bool):
        return str(part).lower()
    if isinstance(part, float | np.floating) and part.is_integer() and abs(float(part)) < 1e15:
        return str(int(part))
    return None if part is None else str(part)
