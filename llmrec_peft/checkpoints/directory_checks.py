"""Checks of the files in a trained directory: links, stray weights, JSON. Nothing here needs torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llmrec_peft.documents import read_mapping
from llmrec_peft.errors import BundleError

# Files that hold weights, or that run code when they are read. Only the directory's own safetensors are allowed.
_WEIGHT_LIKE = (
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".gguf", ".onnx",
    ".safetensors",
)  # fmt: skip


def check_links(directory: Path, what: str) -> None:
    """Raise BundleError if a file is a link out of its directory; `what` names the kind of directory.

    A Hub cache stores a snapshot's files as links into the blobs of the same repository; such links are allowed.
    """
    root = Path(os.path.realpath(directory))
    homes = [root] if root.parent.name != "snapshots" else [root, root.parent.parent / "blobs"]
    for path in sorted(directory.iterdir()):
        if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
            raise BundleError(f"{path} is a link out of the {what}; copy the file itself into the directory")


def stray_weights(directory: Path, own: Collection[str]) -> list[str]:
    """Names of files in a directory that hold weights, or that would run code when read, other than its own."""
    return [name for name in sorted(path.name for path in directory.iterdir()) if name not in own and is_weights(name)]


def is_weights(name: str) -> bool:
    """Whether a file's name says that it holds weights, or that it would run code when read."""
    return Path(name).suffix.lower() in _WEIGHT_LIKE


def read_json(path: Path, advice: str = "copy it again or train again") -> dict[str, Any]:
    """Mapping in a JSON file of a bundle or model. Raises BundleError if it holds anything else, or is too large."""
    return read_mapping(path, error=BundleError, advice=advice)
