"""Types and bounds of configuration values, declared once beside each field.

    r: int = number(16, 1, 4096)
    learning_rate: float = number(3e-4, 0, 100, above=True)

`check_fields` checks an object against its annotations and bounds. Every number has a lower and an upper bound, NaN and
infinity never pass, and a bool is not a number. Nothing here needs torch or Arrow.
"""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, Literal

from llmrec_peft.documents import has_surrogates
from llmrec_peft.errors import ConfigError
from llmrec_peft.messages import quoted

MAX_TEXT = 4096
"""Most characters of a text by default: as many as the longest path."""
MAX_ENTRIES = 100_000
"""Most entries of a list or a mapping."""
MAX_SEED = 2**32 - 1
"""Largest seed of NumPy."""
MAX_COUNT = 10**9
"""Bound of numbers that are only counted and never allocated, such as steps."""
MAX_TOKENS = 10**8
"""Bound of the tokens in one forward pass."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, or of every number in a list or mapping.

    Args:
        low, high: inclusive, except where `above` or `below` is set.
        also: allowed values outside the bounds.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def hold(self, value: Any) -> bool:
        """Whether a number is within the bounds; NaN never is."""
        if value in self.also:
            return True
        low = self.low < value if self.above else self.low <= value
        return bool(low and (value < self.high if self.below else value <= self.high))

    def words(self, value: Any, *, whole: bool, brief: bool) -> str:
        """The bound that a value violates, for a message."""
        low = f"{'above' if self.above else 'at least'} {_plain(self.low)}"
        high = f"{'below' if self.below else 'at most'} {_plain(self.high)}"
        finite = isinstance(value, numbers.Integral) or abs(value) < float("inf")
        if self.high <= 1:
            bound = f"{low} and {high}"
        elif finite and value > self.low:
            bound = high
        elif brief and (whole or (finite and self.above)):
            bound = low
        else:
            bound = f"{'a whole' if whole else 'a finite'} number {low if self.above else f'of {low}'}"
        return ", or ".join([bound, *map(_plain, self.also)])


def number(
    default: Any,
    low: float,
    high: float,
    *,
    above: bool = False,
    below: bool = False,
    also: tuple[float, ...] = (),
) -> Any:
    """A dataclass field for numbers with bounds; see `Bounds`. A callable default is a factory."""
    metadata = {"bounds": Bounds(low, high, above, below, also)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def text(default: Any = MISSING, *, most: int) -> Any:
    """A dataclass field for a text of at most `most` characters."""
    return dataclasses.field(default=default, metadata={"most": most})


def require(rule: bool, field: str, requirement: str, value: object) -> None:
    """Raise ConfigError unless the rule of a setting holds."""
    if not rule:
        key = key_of(field)
        raise ConfigError(f"{key} must be {requirement}, not {quoted(value, 100)}; change {key} in the configuration")


_section: ContextVar[str] = ContextVar("section", default="")


@contextmanager
def section(name: str) -> Iterator[None]:
    """Name the section of a configuration whose values are checked in the block, for messages."""
    token = _section.set(name)
    try:
        yield
    finally:
        _section.reset(token)


def key_of(field: str) -> str:
    """The key of a field: prefixed with its section, unless the field has the prefix already."""
    name = _section.get()
    return field if not name or field == name or field.startswith(f"{name}.") else f"{name}.{field}"


def check_fields(options: Any, prefix: str = "", *, brief: bool = False) -> None:
    """Raise ConfigError for the first field whose value is not of its type or outside its bounds.

    Args:
        options: a dataclass object.
        prefix: section before a field's name in messages, such as `train.`.
        brief: name a bound without the kind of number.
    """
    for name, requirement, value in broken_fields(options, brief=brief):
        require(False, f"{prefix}{name}", requirement, value)


def broken_fields(options: Any, *, brief: bool = False) -> Iterator[tuple[str, str, Any]]:
    """(name, requirement, value) of each field of a dataclass object that breaks its type or bounds."""
    kind: type = type(options)
    for name, (hint, metadata) in annotations_of(kind).items():
        value = getattr(options, name)
        fault = _fault(value, hint, metadata, brief)
        if fault is not None:
            yield name, fault.requirement, value


@cache
def annotations_of(kind: type) -> dict[str, tuple[Any, Any]]:
    """From the name of each field of a dataclass to its type and metadata."""
    hints = typing.get_type_hints(kind)
    return {field.name: (hints[field.name], field.metadata) for field in dataclasses.fields(kind)}


def describe(hint: Any) -> str:
    """A type in words, for messages."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in words:
        return words[hint]
    if kind is Literal:
        return f"{'one of ' if len(inner) > 1 else ''}{', '.join('null' if name is None else name for name in inner)}"
    if kind is list:
        return f"a list, each {describe(inner[0])}"
    if kind is dict:
        return f"a mapping from {describe(inner[0])} to {describe(inner[1])}"
    if isinstance(hint, type):
        return f"a {hint.__name__}"
    return " or ".join(describe(part) for part in inner)


@dataclass(frozen=True)
class _Fault:
    """What a value must be; `fits` if its type is right and only a bound is violated."""

    requirement: str
    fits: bool = False


def _fault(value: Any, hint: Any, metadata: Any, brief: bool) -> _Fault | None:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return _fault_of_union(value, hint, metadata, brief)
    if kind is list:
        return _fault_of_parts(value, list, [(part, inner[0]) for part in value] if isinstance(value, list) else [],
                               hint, metadata, brief)  # fmt: skip
    if kind is dict:
        parts = [pair for key, part in value.items() for pair in ((key, inner[0]), (part, inner[1]))] \
            if isinstance(value, dict) else []  # fmt: skip
        return _fault_of_parts(value, dict, parts, hint, metadata, brief)
    if kind is Literal:
        known = any(type(value) is type(choice) and value == choice for choice in inner)
        return None if known else _Fault(describe(hint))
    if hint in (int, float):
        return _fault_of_number(value, hint, metadata, brief)
    if not isinstance(value, hint):
        return _Fault(describe(hint))
    return _fault_of_text(value, metadata) if hint is str else None


def _fault_of_union(value: Any, hint: Any, metadata: Any, brief: bool) -> _Fault | None:
    others, found = [], None
    for part in typing.get_args(hint):
        fault = _fault(value, part, metadata, brief)
        if fault is None:
            return None
        if fault.fits and found is None:
            found = fault
        else:
            others.append(describe(part))
    if found is None:
        return _Fault(describe(hint))
    return _Fault(", ".join([found.requirement, *others[:-1]]) + "".join(f", or {last}" for last in others[-1:]), True)


def _fault_of_parts(
    value: Any,
    kind: type[list[Any]] | type[dict[Any, Any]],
    parts: list[tuple[Any, Any]],
    hint: Any,
    metadata: Any,
    brief: bool,
) -> _Fault | None:
    if not isinstance(value, kind):
        return _Fault(describe(hint))
    if len(value) > MAX_ENTRIES:
        return _Fault(f"{describe(hint)}, at most {MAX_ENTRIES:,} of them", True)
    for part, part_hint in parts:
        fault = _fault(part, part_hint, metadata, brief)
        if fault is not None:
            article = "a mapping, each part" if kind is dict else "a list, each"
            return _Fault(f"{article} {fault.requirement}", True)
    return None


def _fault_of_number(value: Any, hint: type, metadata: Any, brief: bool) -> _Fault | None:
    kind = numbers.Integral if hint is int else numbers.Real
    bounds = metadata.get("bounds")
    if isinstance(value, bool) or not isinstance(value, kind):
        typed = bounds is not None and hint is int and not brief and bounds.high > 1
        return _Fault(bounds.words(float("nan"), whole=True, brief=False) if typed else describe(hint))
    if bounds is None:
        raise TypeError("a number without bounds; declare its field by number()")
    return None if bounds.hold(value) else _Fault(bounds.words(value, whole=hint is int, brief=brief), True)


def _fault_of_text(value: str, metadata: Any) -> _Fault | None:
    most = metadata.get("most", MAX_TEXT)
    if len(value) > most:
        return _Fault(f"a text of at most {most:,} characters", True)
    if "\0" in value:
        return _Fault("a text without NUL characters", True)
    if has_surrogates(value):
        return _Fault("a text of whole characters, in UTF-8", True)
    return None


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value:g}"
