"""The cache directory, and the JSON, digests and move into place that bundles are written and read with."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.errors import BundleError


def cache_dir() -> Path:
    """Where converted bases and fingerprints are kept: $LLMREC_PEFT_CACHE, or ~/.cache/llmrec_peft."""
    return Path(os.environ.get("LLMREC_PEFT_CACHE") or Path.home() / ".cache" / "llmrec_peft").expanduser()


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Mapping in a JSON file. Raises BundleError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is not readable JSON ({str(error)[:80]}); copy it again or train again") from None
    if not isinstance(value, dict):
        raise BundleError(
            f"{path} holds a {type(value).__name__} where a mapping belongs; copy it again or train again"
        )
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON; numpy numbers become Python's, and NaN or infinity becomes null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """`value` in JSON's types: numpy numbers as Python's, and null for what is not a number, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def move_into_place(scratch: Path, directory: Path) -> None:
    """Rename onto `directory`; an old bundle steps aside first, as a directory cannot replace a full one."""
    if not directory.exists():
        os.replace(scratch, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    os.replace(directory, old)
    try:
        os.replace(scratch, directory)
    except OSError:
        os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
