"""serving.json: what an exported student says of itself, and the digests that tie it to its files.

It seals itself, so that an edit of the domain, the calibration or a token shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.sealing import Whole, check_schema, check_seal, sealed, sha256
from llmrec_peft.documents import read_mapping
from llmrec_peft.errors import BundleError
from llmrec_peft.probabilities import read_calibration

FORMAT_VERSION = 1
KIND = "onnx"
MANIFEST, TOKENIZER = "serving.json", "tokenizer.json"
MODELS = {"float32": "model.onnx", "int8": "model.int8.onnx"}
"""From a precision to the file of its graph; int8 may be left out."""
MOST_BYTES = {TOKENIZER: 64 << 20, **dict.fromkeys(MODELS.values(), 2 << 30)}
"""Bytes of each file, at most: protobuf ends at 2 GiB."""
_TOKEN = Whole(0, 2**31 - 1)
_SCHEMA: dict[str, Any] = {
    "source": dict,
    "domain": {"name": str, "event": str, "header": str, "outcomes": {str: str},
               "stream": {"history_labels?": ([str], None)}},
    "labels": [str],
    "calibration": (dict, None),
    "window": {"events": Whole(0, 10**6), "stride": Whole(1, 10**6), "max_length": Whole(1, 10**9)},
    "tokens": {
        "prefix": [_TOKEN], "suffix": [_TOKEN], "marker": [_TOKEN], "outcomes": [[_TOKEN]], "pad": _TOKEN,
        "reserved": [_TOKEN], "unknown_item": (_TOKEN, None),
    },
    "forbidden": [str],
    "opset": Whole(1, 1000),
    "max_positions": (Whole(1, 10**9), None),
    "files": {TOKENIZER: str, MODELS["float32"]: str},
    "measured": dict,
    "counts": dict,
    "metrics": dict,
    "versions": {str: str},
    "seal": str,
}  # fmt: skip
_RESTORE = "restore the file that the export wrote, or export again"


def read_serving(directory: str | Path) -> dict[str, Any]:
    """serving.json of an export, its parts' types, its labels and its seal checked; no other file is read.

    Raises:
        BundleError: none there, another format version, or anything missing or edited.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise BundleError(f"{directory} has no {MANIFEST}; name the directory that export_onnx wrote")
    manifest = read_mapping(path, error=BundleError, advice=_RESTORE)
    if manifest.get("kind") != KIND:
        raise BundleError(f"{path} is not of an exported student; name the directory that export_onnx wrote")
    if type(manifest.get("format_version")) is not int or manifest["format_version"] != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {manifest.get('format_version')!r}, and this version reads {FORMAT_VERSION}; "
            "use the package version that wrote it, or export again"
        )
    check_schema(manifest, _SCHEMA, path, _RESTORE)
    outcomes, labels = manifest["domain"]["outcomes"], manifest["labels"]
    if labels != list(outcomes) or len(labels) < 2 or len(manifest["tokens"]["outcomes"]) != len(labels):
        raise BundleError(
            f"{path} has the labels {labels} with {len(manifest['tokens']['outcomes'])} words, but its domain has "
            f"{outcomes}; {_RESTORE}"
        )
    check_seal(manifest, path, _RESTORE)
    return manifest


def check_file(directory: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The path of one of the export's files. Raises BundleError for one that is too large, or is another's."""
    path, said = directory / name, str(manifest["files"].get(name))
    if path.is_file() and path.stat().st_size > MOST_BYTES[name]:
        raise BundleError(
            f"{path} has {path.stat().st_size:,} bytes, and at most {MOST_BYTES[name]:,} are read; {_RESTORE}"
        )
    found = sha256(path) if path.is_file() else "none"
    if found != said:
        raise BundleError(f"{path} has the SHA-256 {found[:16]}..., but {MANIFEST} says {said[:16]}...; {_RESTORE}")
    return path


def described(content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with the kind, the format version and the seal of all."""
    return sealed({"format_version": FORMAT_VERSION, "kind": KIND, **content})


def calibration_of(manifest: Mapping[str, Any]) -> tuple[float, list[float] | float]:
    """Temperature, and the bias of each label. Raises BundleError where they are out of bounds, or not one a label."""
    temperature, bias = read_calibration(manifest["calibration"], len(manifest["labels"]), MANIFEST)
    return temperature, 0.0 if bias is None else list(bias)
