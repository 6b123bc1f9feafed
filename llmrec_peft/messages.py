"""Values, paths and names as they stand in a one-line message."""

from __future__ import annotations

from collections.abc import Iterable


def shortened(value: object, limit: int = 100) -> str:
    """A path or text for a message, cut in its middle; characters that cannot be printed are escaped."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def quoted(value: object, limit: int = 60) -> str:
    """`repr` of a value for a message, cut in its middle; the value's type where `repr` fails."""
    try:
        text = repr(value)
    except Exception:  # nested too deep, too many digits, or a bug in the object's own `__repr__`
        return f"a {type(value).__name__} that cannot be shown"
    return shortened(text if text.isprintable() else " ".join(text.split()), limit)


def listed(values: Iterable[object]) -> str:
    """Names joined by commas, or "none"."""
    return ", ".join(str(value) for value in values) or "none"
