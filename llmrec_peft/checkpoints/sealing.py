"""What manifests share: their seal, the digests of files, and one check of types and bounds.

A manifest is the JSON file beside the weights of a bundle, a merged model, an export or a retrieval index. A schema
says what it may hold, by plain values:

    str, bool, dict, list      a value of that type, whatever it holds; a text has at most MAX_TEXT characters
    Whole(0, 9), Real(0, 1)    a number between two bounds; a bool is none
    None, "lora"               that value itself
    (str, None)                one of several
    [schema]                   a list, each of the schema
    {str: schema}              a mapping from texts, each to a value of the schema
    {"a": schema, "b?": schema}  a mapping that has `a`, and may have `b` and others

Nothing here needs torch or Arrow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec_peft.errors import BundleError
from llmrec_peft.messages import shortened

MAX_TEXT = 100_000
"""Characters of a text, at most."""
_WORDS = {str: "a text", bool: "true or false", dict: "a mapping", list: "a list"}


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
        path: of the manifest, for the message.
        advice: what the user can do.
        name: of the value inside the manifest.
    """
    if isinstance(schema, tuple):
        alike = [choice for choice in schema if isinstance(choice, dict | list) and type(choice) is type(value)]
        if len(alike) == 1:  # so that the message names the part
            check_schema(value, alike[0], path, advice, name)
        elif not any(_fits(value, choice, path) for choice in schema):
            _refuse(value, " or ".join(map(_told, schema)), path, advice, name)
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
        _refuse(value, _told(schema), path, advice, name)


def _fits(value: Any, schema: Any, path: Path) -> bool:
    try:
        check_schema(value, schema, path, "")
    except BundleError:
        return False
    return True


def _check_kind(value: Any, kind: type, path: Path, advice: str, name: str) -> None:
    if not isinstance(value, kind) or (kind is str and len(value) > MAX_TEXT):
        _refuse(value, _told(kind), path, advice, name)


def _same(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and value == wanted


def _told(schema: Any) -> str:
    if isinstance(schema, type):
        return _WORDS[schema]
    if isinstance(schema, dict | list):
        return _WORDS[type(schema)]
    return "null" if schema is None else str(schema) if isinstance(schema, Whole | Real) else repr(schema)


def _refuse(value: Any, wanted: str, path: Path, advice: str, name: str) -> None:
    found = shortened(json.dumps(value, ensure_ascii=True, default=str))
    raise BundleError(f"{path} has no valid entry {shortened(name)!r}: it must be {wanted}, not {found}; {advice}")


# -- digests -----------------------------------------------------------------------------------------


def content_digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical text: keys sorted, so the order of labels is for `labels` to keep."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def seal_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all of a manifest but the seal itself."""
    return content_digest({key: value for key, value in manifest.items() if key != "seal"})


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its seal, as it is written; values are those of JSON."""
    return {**manifest, "seal": seal_of(manifest)}


def check_seal(manifest: Mapping[str, Any], path: Path, advice: str) -> None:
    """Raise BundleError where a manifest was edited after it was sealed."""
    found, said = seal_of(manifest), str(manifest.get("seal"))
    if found != said:
        raise BundleError(
            f"{path} has the SHA-256 {found[:16]}..., but says {shortened(said[:16])}..., so it was edited; {advice}"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
