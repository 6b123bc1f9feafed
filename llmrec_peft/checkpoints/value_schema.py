"""A small schema language for manifests: types and bounds of JSON values. Nothing here needs torch or Arrow.

A schema is a plain value:

    str, bool, dict, list        a value of that type with any content; a text has at most MAX_TEXT characters
    Whole(0, 9), Real(0, 1)      a number between two bounds; a bool is not a number
    None, "lora"                 exactly that value
    (str, None)                  one of several
    [schema]                     a list, each entry of the schema
    {str: schema}                a mapping from texts to values of the schema
    {"a": schema, "b?": schema}  a mapping that must have `a`, and may have `b` and other keys
"""

from __future__ import annotations

import json
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec_peft.errors import BundleError
from llmrec_peft.messages import shortened

MAX_TEXT = 100_000
"""Characters of a text, at most."""
_TYPE_NAMES = {str: "a text", bool: "true or false", dict: "a mapping", list: "a list"}


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def holds(self, value: Any) -> bool:
        """Whether a value is one."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Real:
    """A finite number from `low` to `high`."""

    low: float
    high: float

    def holds(self, value: Any) -> bool:
        """Whether a value is one."""
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


def check_schema(value: Any, schema: Any, path: Path, advice: str, name: str = "") -> None:
    """Raise BundleError for the first value that breaks a schema.

    Args:
        path: path of the manifest, for the message.
        advice: what the user can do, for the message.
        name: name of the value inside the manifest, for the message.
    """
    if isinstance(schema, tuple):
        alike = [choice for choice in schema if isinstance(choice, dict | list) and type(choice) is type(value)]
        if len(alike) == 1:  # descend, so that the message names the entry that is wrong
            check_schema(value, alike[0], path, advice, name)
        elif not any(_fits(value, choice, path) for choice in schema):
            _refuse(value, " or ".join(map(_described, schema)), path, advice, name)
    elif isinstance(schema, dict) and str not in schema:
        _check_kind(value, dict, path, advice, name)
        for key, part in schema.items():
            known = key.removesuffix("?")
            if known in value:
                check_schema(value[known], part, path, advice, f"{name}.{known}" if name else known)
            elif known == key:
                missing = f"{name}.{key}" if name else key
                raise BundleError(f"{path} has no valid entry {missing!r}, which is missing; {advice}")
    elif isinstance(schema, dict):
        _check_kind(value, dict, path, advice, name)
        for key, part in value.items():
            check_schema(part, schema[str], path, advice, f"{name}.{key}")
    elif isinstance(schema, list):
        _check_kind(value, list, path, advice, name)
        for number, part in enumerate(value):
            check_schema(part, schema[0], path, advice, f"{name}[{number}]")
    elif isinstance(schema, type):
        _check_kind(value, schema, path, advice, name)
    elif not (schema.holds(value) if isinstance(schema, Whole | Real) else value is schema or _same(value, schema)):
        _refuse(value, _described(schema), path, advice, name)


def _fits(value: Any, schema: Any, path: Path) -> bool:
    try:
        check_schema(value, schema, path, "")
    except BundleError:
        return False
    return True


def _check_kind(value: Any, kind: type, path: Path, advice: str, name: str) -> None:
    too_long = kind is str and isinstance(value, Sized) and len(value) > MAX_TEXT
    if not isinstance(value, kind) or too_long:
        _refuse(value, _described(kind), path, advice, name)


def _same(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and value == wanted


def _described(schema: Any) -> str:
    if isinstance(schema, type):
        return _TYPE_NAMES[schema]
    if isinstance(schema, dict | list):
        return _TYPE_NAMES[type(schema)]
    return "null" if schema is None else str(schema) if isinstance(schema, Whole | Real) else repr(schema)


def _refuse(value: Any, wanted: str, path: Path, advice: str, name: str) -> None:
    found = shortened(json.dumps(value, ensure_ascii=True, default=str))
    raise BundleError(f"{path} has no valid entry {shortened(name)!r}: it must be {wanted}, not {found}; {advice}")
