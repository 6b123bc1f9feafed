"""Types and bounds of configuration values, each said once beside its field.

    r: int = number(16, 1, 4096)
    learning_rate: float = number(3e-4, 0, 100, above=True)

`check_fields` holds an object to its annotations and bounds. Every number has a lower and an upper bound, NaN and
infinity never pass, and a bool is no number. Nothing here needs torch or Arrow.
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
"""Characters of a text, at most, where its field says nothing else: as long as the longest path."""
MAX_ENTRIES = 100_000
"""Entries of a list or a mapping, at most."""
MAX_SEED = 2**32 - 1
"""NumPy takes no larger one."""
MAX_COUNT = 10**9
"""Bound of what only counts and is never allocated, such as steps."""
MAX_TOKENS = 10**8
"""Bound of the tokens in one forward pass."""


@dataclass(frozen=True)
class Bounds:
    """What a number may be, or every number of a list or mapping.

    Args:
        low, high: inclusive, except where `above` or `below` is set.
        also: single values outside the bounds that are allowed too.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def hold(self, value: Any) -> bool:
        """Whether a number keeps the bounds; NaN never does."""
        if value in self.also:
            return True
        low = self.low < value if self.above else self.low <= value
        return bool(low and (value < self.high if self.below else value <= self.high))

    def words(self, value: Any, *, whole: bool, brief: bool) -> str:
        """The bound that a value breaks, for a message."""
        low = f"{'above' if self.above else 'at least'} {_plain(self.low)}"
        high = f"{'below' if self.below else 'at most'} {_plain(self.high)}"
        finite = isinstance(value, numbers.Integral) or abs(value) < float("inf")
        if self.high <= 1:
            said = f"{low} and {high}"
        elif finite and value > self.low:
            said = high
        elif brief and (whole or (finite and self.above)):
            said = low
        else:
            said = f"{'a whole' if whole else 'a finite'} number {low if self.above else f'of {low}'}"
        return ", or ".join([said, *map(_plain, self.also)])


def number(
    default: Any,
    low: float,
    high: float,
    *,
    above: bool = False,
    below: bool = False,
    also: tuple[float, ...] = (),
) -> Any:
    """A dataclass field of numbers with bounds; see `Bounds`. A callable default makes the value."""
    metadata = {"bounds": Bounds(low, high, above, below, also)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def text(default: Any = MISSING, *, most: int) -> Any:
    """A dataclass field of a text of `most` characters or fewer."""
    return dataclasses.field(default=default, metadata={"most": most})


def require(rule: bool, field: str, requirement: str, value: object) -> None:
    """Raise ConfigError unless a setting keeps its rule."""
    if not rule:
        key = key_of(field)
        raise ConfigError(f"{key} must be {requirement}, not {quoted(value, 100)}; change {key} in the configuration")


_section: ContextVar[str] = ContextVar("section", default="")


@contextmanager
def section(name: str) -> Iterator[None]:
    """Values that are checked in the block belong to this section of a configuration; messages name them by it."""
    token = _section.set(name)
    try:
        yield
    finally:
        _section.reset(token)


def key_of(field: str) -> str:
    """The key of a field: behind its section's name, unless the field has it already."""
    name = _section.get()
    return field if not name or field == name or field.startswith(f"{name}.") else f"{name}.{field}"


def check_fields(options: Any, prefix: str = "", *, brief: bool = False) -> None:
    """Raise ConfigError for the first field whose value is not of its type or outside its bounds.

    Args:
        options: a dataclass object.
        prefix: section that messages put before a field's name, such as `train.`.
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
    """Say a type in words, for messages."""
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
    """What a value must be; `fits` where its type is right and only a bound is broken."""

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
