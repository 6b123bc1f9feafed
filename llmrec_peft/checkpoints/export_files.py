"""The files of an ONNX export: size limits and checksums. Nothing here needs torch or Arrow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints import checksum
from llmrec_peft.checkpoints.manifest_schema import EXPORT, GRAPHS, SERVING_MANIFEST, TOKENIZER
from llmrec_peft.errors import BundleError

MOST_BYTES = {TOKENIZER: 64 << 20, **dict.fromkeys(GRAPHS.values(), 2 << 30)}
"""Bytes of each file, at most: protobuf ends at 2 GiB."""


def check_export_file(directory: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The path of one of the export's files. Raises BundleError if it is too large or has another checksum."""
    path = directory / name
    if path.is_file() and path.stat().st_size > MOST_BYTES[name]:
        raise BundleError(
            f"{path} has {path.stat().st_size:,} bytes, and at most {MOST_BYTES[name]:,} are read; {EXPORT.restore}"
        )
    checksum.check_file(path, str(manifest["files"].get(name)), SERVING_MANIFEST, EXPORT.restore)
    return path
