"""Whether the files of a bundle are still those that were read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

from llmrec_peft.checkpoints.manifest_schema import FILES
from llmrec_peft.errors import BundleError

ChangeKey: TypeAlias = tuple[Any, ...]
"""Real path of a bundle, and inode, size and modification time of each file. Another key is another version."""


def read_change_key(directory: Path) -> ChangeKey:
    """The key of a bundle's directory, without reading its files.

    Raises:
        BundleError: a file that cannot be looked at.
    """
    try:
        return _change_key(directory)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        place = Path(getattr(error, "filename", None) or directory).name
        raise BundleError(
            f"bundle {directory} cannot be read ({reason}: {place}); name a directory that training left"
        ) from None


def is_unchanged(directory: Path, key: ChangeKey) -> bool:
    """Whether a directory still holds the version of this key."""
    try:
        return _change_key(directory) == key
    except OSError:
        return False


def _change_key(directory: Path) -> ChangeKey:
    found = [(directory / name).stat() for name in FILES]
    return (os.path.realpath(directory), *((part.st_ino, part.st_size, part.st_mtime_ns) for part in found))
