"""Where a merged model, a student or an export is written: checks of the place, a scratch directory beside it, and the
move into place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from llmrec_peft.checkpoints.manifest import is_merged
from llmrec_peft.errors import BundleError, output_errors
from llmrec_peft.files import move_into_place, scratch_directory


def check_output(directory: str | Path, *sources: str | Path) -> Path:
    """Check the output directory of a merge: it must be new, empty, or hold a merged model.

    Raises BundleError for anything else, and for a directory that the merge itself reads from.
    """
    directory = without_links(directory)
    for source in sources:
        if directory.exists() and Path(source).exists() and directory.samefile(source):
            raise BundleError(f"{directory} is what is merged; choose another directory for the result")
    if directory.exists() and not directory.is_dir():
        raise BundleError(f"{directory} is a file; choose another directory for the merged model")
    if directory.exists() and any(directory.iterdir()) and not is_merged(directory):
        raise BundleError(
            f"{directory} exists and holds no merged model, so it is not replaced; choose another directory"
        )
    return directory


def without_links(directory: str | Path) -> Path:
    """The directory that a link points to; BundleError for a circle of links."""
    directory = Path(directory)
    if not directory.is_symlink():
        return directory
    place = Path(os.path.realpath(directory))
    if place.is_symlink():
        raise BundleError(f"{directory} is a link that leads round in a circle; choose another directory")
    return place


@contextmanager
def scratch_beside(directory: Path) -> Iterator[Path]:
    """A scratch directory beside `directory`, removed when the block ends, with what killed processes left.

    Raises BundleError if the disk is full or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with writing(directory):
            scratch = stack.enter_context(scratch_directory(directory))
            scratch.chmod(0o755)
        yield scratch


def writing(directory: Path) -> AbstractContextManager[None]:
    """Turn an error in writing, of this or another library, into a BundleError of one line."""
    return output_errors(BundleError, f"merged model {directory}", "make room or choose another directory")


def publish(scratch: Path, directory: Path) -> None:
    """Sync a finished scratch directory to disk and move it into place, whole or not at all."""
    for path in (*scratch.iterdir(), scratch):
        _sync(path)
    move_into_place(scratch, directory)
    _sync(directory.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_room(directory: Path, needed: int) -> None:
    """Raise BundleError where the disk has not `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise BundleError(
            f"merged model of {needed / 1e9:.2f} GB does not fit on the disk of {directory}, which has "
            f"{free / 1e9:.2f} GB free; make room or choose another directory"
        )
