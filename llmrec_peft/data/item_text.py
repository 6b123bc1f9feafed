"""Templates and the values that fill them, as text alone: what serving needs of a domain, without Arrow."""

import re
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmrec_peft.data.values import plain, replace_surrogates, shorten
from llmrec_peft.documents import has_surrogates
from llmrec_peft.errors import DomainError

OUTCOME_COLUMNS = ("label", "rating", "behaviour")
"""Columns of interactions that tell an outcome; no template may show them."""
MAX_TEMPLATE, MAX_FIELDS = 100_000, 200
"""Characters and fields of a template, at most."""
MAX_WIDTH, MAX_SPEC = 1_000, 100
"""Largest number in a format, such as its width, and characters of a format, at most."""

# White space, control characters, Unicode's default-ignorable code points (fillers, joiners, bidi marks, variation
# selectors, soft hyphen, tags), annotation marks, and the braille blank: what leaves no ink.
_UNSEEN = (
    (0x00, 0x20), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x1680, 0x1680),
    (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800),
    (0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB),
    (0x1BCA0, 0x1BCA3), (0x1D159, 0x1D159), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
SEEN = "[^" + "".join(f"{chr(low)}-{chr(high)}" for low, high in _UNSEEN) + "]"
"""Regular expression of one visible character, the same for Python's `re` and for Arrow's RE2."""
_SEEN = re.compile(SEEN)

# Everything that could end a line or hide in one; runs become one space.
_BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b\u2028\u2029\ufeff]+")


def listed(values: list[str]) -> str:
    """Names joined by commas, or "none"."""
    return ", ".join(str(value) for value in values) or "none"


def is_unseen(text: str) -> bool:
    """Whether a text is empty, or only white space and other characters that nobody sees; as `tables.is_blank`."""
    return _SEEN.search(text) is None


def title_fault(title: Any) -> str | None:
    """What is wrong with an item's title, as the end of a sentence that begins with the item; None if it is sound."""
    if title is None or (isinstance(title, float) and title != title):
        return f"has no title ({title})"
    if not isinstance(title, str):
        return f"has a title that is no text, {shorten(title)}"
    return f"has a title without a visible character, {shorten(title)}" if is_unseen(title) else None


def check_template(template: str, what: str) -> None:
    """Raise DomainError unless a template names plain columns in formats of a bounded size.

    Args:
        template: text with {column} or {column:format} fields.
        what: names it in messages.
    """
    if len(template) > MAX_TEMPLATE:
        raise DomainError(f"{what} has {len(template):,} characters, and {MAX_TEMPLATE:,} are the most; shorten it")
    if has_surrogates(template):
        raise DomainError(f"{what} holds half of a surrogate pair, which is no character; remove it")
    try:
        fields = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DomainError(f"{what} is not a template ({error}); write {{{{ for a brace") from None
    if len(fields) > MAX_FIELDS:
        raise DomainError(f"{what} has {len(fields)} fields, and {MAX_FIELDS} are the most; use fewer")
    for _, name, spec, turned in fields:
        if not name.isidentifier() or turned:
            shown = shorten(name + (f"!{turned}" if turned else ""))[1:-1]
            raise DomainError(f"{what} has the field {{{shown}}}; fields are column names, such as {{title}}")
        sizes = [number for number in re.findall(r"\d+", spec) if len(number) > 9 or int(number) > MAX_WIDTH]
        if sizes or len(spec) > MAX_SPEC or "{" in spec:
            rule = (
                "no field inside" if "{" in spec else f"no number above {MAX_WIDTH} and at most {MAX_SPEC} characters"
            )
            raise DomainError(
                f"{what} has the format {shorten(spec)} of {{{name}}}; a format has {rule}; write it as in "
                "{price:.2f}"
            )


def template_columns(template: str) -> list[str]:
    """Names in braces of a template, each once, in order."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return list(dict.fromkeys(names))


def template_literals(template: str) -> list[str]:
    """Fixed texts of a template, in order."""
    return [literal for literal, _, _, _ in string.Formatter().parse(template) if literal]


def neutralise(text: str, forbidden: list[str]) -> str:
    """A column's value as plain data: one line, without any text that the stream gives a meaning to.

    Line breaks and control characters become one space, and half a surrogate pair U+FFFD. A forbidden text is broken
    up by a space (a single character is replaced by one), again and again until none is left, since taking one out can
    spell another.
    """
    return broken_up(_BREAKS.sub(" ", replace_surrogates(text)).strip(), forbidden)


def broken_up(text: str, forbidden: list[str]) -> str:
    """A text whose forbidden words are each broken up by a space."""
    # With a space at its edge a text could never be broken up.
    forbidden = [word.strip() for word in forbidden if word.strip()]
    while any(word in text for word in forbidden):
        for word in forbidden:
            text = text.replace(word, word[0] + " " + word[1:] if len(word) > 1 else " ")
    return text


def fill(template: str, columns: Mapping[str, Any], forbidden: list[str]) -> str:
    """Fill a template for one row, as `domain.render` does for many.

    Args:
        template: text with {column} or {column:format} fields.
        columns: a Python value for each field, see `values.plain`; None and NaN become the empty text, and a list its
            parts with commas.
        forbidden: see :func:`neutralise`.

    Raises:
        DomainError: a format that does not fit its value, or a value that is no text, number, date or list of these.
        DataError: a number that is infinite or beyond 64 bits.
    """
    parts = []
    for literal, name, spec, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(value_text(name, columns[name], spec or "", forbidden))
    text = "".join(parts)
    literals = template_literals(template)
    # Two harmless values side by side can still spell a forbidden text: "-" and ">". What the template itself spells,
    # such as a chat's special tokens, is the domain's own wish.
    for word in forbidden:
        if text.count(word) > sum(literal.count(word) for literal in literals):
            text = broken_up(text, forbidden)
    return text


def value_text(name: str, value: Any, spec: str, forbidden: list[str], column: str = "") -> str:
    """One value of the column `name`, formatted and neutralised: all that either `fill` or `render` writes of it.

    column: what messages say of the whole column, ahead of the value.
    """
    value = plain(name, value)
    if isinstance(value, list):
        texts = [part_text(part) for part in value]
        value = None if None in texts else ", ".join(texts)
    if value is None:
        return ""
    try:
        return neutralise(format(value, spec) if spec else str(value), forbidden)
    except (ValueError, TypeError, OverflowError) as error:
        raise DomainError(
            f"field {{{name}:{spec}}} does not fit the {column}value {shorten(value)} ({error}); correct the format"
        ) from None


def part_text(part: Any) -> str | None:
    """A plain value in a list, as text; None if it is missing."""
    if isinstance(part, bool):
        return str(part).lower()
    whole = isinstance(part, float | np.floating) and part.is_integer() and abs(part) < 1e15
    return None if part is None else str(int(part) if whole else part)
