"""SHA-256 checksums: of files, of JSON values, and of a manifest as a whole. Nothing here needs torch or Arrow.

A manifest stores its own checksum under the key `seal`, so an edit of any other entry shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.errors import BundleError
from llmrec_peft.files import plain
from llmrec_peft.messages import shortened

KEY = "seal"
"""The entry of a manifest that holds its checksum."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical text. Keys are sorted, so the order of the labels does not change it."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest(value: Mapping[str, Any] | None) -> str:
    """SHA-256 of a mapping, whose values are first converted to those of JSON."""
    return content_digest(plain(value))


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all entries of a manifest but the checksum itself."""
    return content_digest({key: value for key, value in manifest.items() if key != KEY})


def with_checksum(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its checksum, as it is written; its values are those of JSON."""
    return {**manifest, KEY: checksum_of(manifest)}


def check_checksum(manifest: Mapping[str, Any], path: Path, advice: str) -> None:
    """Raise BundleError where a manifest was edited after its checksum was computed."""
    found, stated = checksum_of(manifest), str(manifest.get(KEY))
    if found != stated:
        raise BundleError(
            f"{path} has the SHA-256 {found[:16]}..., but says {shortened(stated[:16])}..., so it was edited; {advice}"
        )


def check_file(path: Path, stated: str, manifest: str, advice: str) -> None:
    """Raise BundleError unless a file is there and has the SHA-256 that its manifest (a file name) states."""
    found = sha256(path) if path.is_file() else "none"
    if found != stated:
        raise BundleError(f"{path} has the SHA-256 {found[:16]}..., but {manifest} says {stated[:16]}...; {advice}")
