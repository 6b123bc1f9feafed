"""Templates and the values that fill them, as text alone: what serving needs of a domain, without Arrow."""

import re
import string
from collections.abc import Mapping
from typing import Any

from ..errors import DomainError

# Everything that could end a line or hide in one; runs become one space.
_BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b\u2028\u2029\ufeff]+")


def shorten(value: object, limit: int = 60) -> str:
    """`repr` of a value, cut to fit a one-line message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(values: list[str]) -> str:
    """Names joined by commas, or "none"."""
    return ", ".join(str(value) for value in values) or "none"


def replace_surrogates(text: str) -> str:
    """The text with each half of a surrogate pair replaced by U+FFFD; two halves that fit become their character.

    JSON can spell half a pair by an escape; Arrow, tokenizers and UTF-8 cannot hold one.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def template_columns(template: str) -> list[str]:
    """Names in braces of a template, each once, in order."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return list(dict.fromkeys(names))


def template_literals(template: str) -> list[str]:
    """Fixed texts of a template, in order."""
    return [literal for literal, _, _, _ in string.Formatter().parse(template) if literal]


def neutralise(text: str, forbidden: list[str]) -> str:
    """A column's value as plain data: one line, without any text that the stream gives a meaning to.

    Line breaks and control characters become one space. A forbidden text is broken up by a space (a single character
    is replaced by one), again and again until none is left, since taking one out can spell another.
    """
    return broken_up(_BREAKS.sub(" ", text).strip(), forbidden)


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
        columns: a Python value for each field; None becomes the empty text, and a list its parts with commas.
        forbidden: see :func:`neutralise`.

    Raises:
        DomainError: a format that does not fit its value, or a value that is a mapping.
    """
    parts = []
    for literal, name, spec, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(_as_text(name, columns[name], spec or "", forbidden))
    text = "".join(parts)
    literals = template_literals(template)
    # Two harmless values side by side can still spell a forbidden text: "-" and ">". What the template itself spells,
    # such as a chat's special tokens, is the domain's own wish.
    for word in forbidden:
        if text.count(word) > sum(literal.count(word) for literal in literals):
            text = broken_up(text, forbidden)
    return text


def _as_text(name: str, value: Any, spec: str, forbidden: list[str]) -> str:
    if isinstance(value, Mapping):
        raise DomainError(f"field {{{name}}} names a mapping, {shorten(value)}; flatten it to texts or numbers first")
    if isinstance(value, list | tuple):
        value = None if any(part is None for part in value) else ", ".join(map(_part, value))
    if value is None:
        return ""
    try:
        return neutralise(format(value, spec) if spec else str(value), forbidden)
    except (ValueError, TypeError) as error:
        raise DomainError(
            f"field {{{name}:{spec}}} does not fit the value {shorten(value)} ({error}); correct the format"
        ) from None


def _part(value: Any) -> str:
    """A list's part as Arrow spells it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
