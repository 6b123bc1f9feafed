"""serving.json: what an exported student says of itself, and the digests that tie it to its files.

It seals itself, so that an edit of the domain, the calibration or a token shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..probabilities import read_calibration

FORMAT_VERSION = 1
KIND = "onnx"
MANIFEST, TOKENIZER = "serving.json", "tokenizer.json"
MODELS = {"float32": "model.onnx", "int8": "model.int8.onnx"}
"""From a precision to the file of its graph; int8 may be left out."""
_TYPES: dict[str, type | tuple[type, ...]] = {
    "source": dict,
    "domain": dict,
    "labels": list,
    "calibration": (dict, type(None)),
    "window": dict,
    "tokens": dict,
    "forbidden": list,
    "opset": int,
    "max_positions": (int, type(None)),
    "files": dict,
    "measured": dict,
    "counts": dict,
    "metrics": dict,
    "versions": dict,
    "seal": str,
}
_RESTORE = "restore the file that the export wrote, or export again"


def read_serving(directory: str | Path) -> dict[str, Any]:
    """serving.json of an export, its parts' types, its labels and its seal checked; no other file is read.

    Raises:
        BundleError: none there, another format version, or anything missing or edited.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise BundleError(f"{directory} has no {MANIFEST}; name the directory that export_onnx wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is not readable JSON ({str(error)[:80]}); {_RESTORE}") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise BundleError(f"{path} is not of an exported student; name the directory that export_onnx wrote")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {manifest.get('format_version')!r}, and this version reads {FORMAT_VERSION}; "
            "use the package version that wrote it, or export again"
        )
    for key, kind in _TYPES.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise BundleError(f"{path} has no valid entry {key!r}; {_RESTORE}")
    found = seal_of(manifest)
    if found != manifest["seal"]:
        raise BundleError(
            f"{path} has the SHA-256 {found[:16]}..., but says {manifest['seal'][:16]}..., so it was edited; {_RESTORE}"
        )
    return manifest


def check_file(directory: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The path of one of the export's files. Raises BundleError naming both digests where it is another's."""
    path, said = directory / name, str(manifest["files"].get(name))
    found = sha256(path) if path.is_file() else "none"
    if found != said:
        raise BundleError(f"{path} has the SHA-256 {found[:16]}..., but {MANIFEST} says {said[:16]}...; {_RESTORE}")
    return path


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with the kind, the format version and the seal of all."""
    manifest = {"format_version": FORMAT_VERSION, "kind": KIND, **content}
    return {**manifest, "seal": seal_of(manifest)}


def seal_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of all but the seal itself."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def calibration_of(manifest: Mapping[str, Any]) -> tuple[float, list[float] | float]:
    """Temperature, and the bias of each label. Raises BundleError where they are out of bounds, or not one a label."""
    temperature, bias = read_calibration(manifest["calibration"], len(manifest["labels"]), MANIFEST)
    return temperature, 0.0 if bias is None else list(bias)
