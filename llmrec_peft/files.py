"""Write files and directories atomically: under a temporary name beside the target, then moved into place.

A temporary name is `.NAME.<8 hex digits>.partial`. While a directory is replaced, the old one is called
`.NAME-old-<8 hex digits>`. The process that uses such a name holds a lock on it, which the system releases however the
process ends. So `sweep` recognises and removes only what killed processes left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

from llmrec_peft.errors import ConfigError, LLMRecError, output_errors

_PARTIAL = re.compile(r"\.(.+)\.(?:[0-9]+|[0-9a-f]{8})\.partial", re.DOTALL)
_OLD = re.compile(r"\.(.+)-old-[0-9a-z_]{8}", re.DOTALL)
_SCRATCH = re.compile(r"\.(.+)-merging-[0-9a-z_]{8}", re.DOTALL)  # of earlier versions


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; it replaces `path` at the end, and is removed after an error.

    Raises:
        FileExistsError: `path` is a link, a device, a pipe or a directory; raised before anything is written.
    """
    _check_replaced(path)
    with scratch_file(path) as partial:
        yield partial
        _check_replaced(path)
        os.replace(partial, path)


def _check_replaced(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "It is not a regular file, so it is not replaced", str(path))


@contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to, removed when the block ends; leftovers of killed processes go too."""
    with _scratch(path, lambda name: os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))) as scratch:
        try:
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to fill and `move_into_place`, removed when the block ends; leftovers go too."""
    path = _named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(path, os.mkdir) as scratch:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _scratch(path: Path, make: Callable[[Path], Any]) -> Iterator[Path]:
    sweep(path.parent, path.name)
    while True:
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        make(scratch)
        with _locked(scratch, wait=True):
            if scratch.exists():  # else somebody swept it before it was locked
                yield scratch
                return


def move_into_place(scratch: Path, directory: Path) -> None:
    """Rename `scratch` to `directory`; an existing one is renamed first, as a directory cannot replace a full one."""
    directory = _named(directory)
    if not directory.exists():
        os.replace(scratch, directory)
        return
    with _locked(directory):
        old = directory.with_name(f".{directory.name}-old-{secrets.token_hex(4)}")
        os.replace(directory, old)
        try:
            os.replace(scratch, directory)
        except OSError:
            os.replace(old, directory)
            raise
        shutil.rmtree(old, ignore_errors=True)


def sweep(directory: Path, name: str | None = None) -> None:
    """Remove what killed processes left in a directory, of the file or directory `name` or of all.

    If a replacement was interrupted between its two renames, the old directory is restored. Files of running processes
    stay, and so does everything on file systems without locks.
    """
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(directory)):
            old, partial = _OLD.fullmatch(entry), _PARTIAL.fullmatch(entry) or _SCRATCH.fullmatch(entry)
            found = partial or old
            if found is not None and name in (None, found[1]):
                with contextlib.suppress(OSError):
                    _remove_if_left(directory / entry, None if partial else directory / found[1])


def _remove_if_left(path: Path, place: Path | None) -> None:
    """Remove `path` if no process holds a lock on it; an old directory goes back to `place` if that is free."""
    with _locked(path) as left:
        if not left:
            return
        if place is not None and not place.exists():
            os.replace(path, place)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextmanager
def _locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on a file or directory; yields False if another process holds it, or without file locks."""
    handle, locked = None, False
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        locked = True
    try:
        yield locked
    finally:
        if handle is not None:
            os.close(handle)


def _named(path: Path) -> Path:
    """The path with `.`, `..` and a link resolved, so that it ends in a name."""
    return Path(os.path.realpath(path)) if path.name in ("", "..") or path.is_symlink() else path


def writing(
    path: str | Path, what: str = "output_dir", error: type[LLMRecError] = ConfigError
) -> AbstractContextManager[None]:
    """Turn what writing an output raises, as on a full disk, into one line; `what` names the output before its path."""
    return output_errors(error, f"{what} {path}", "make room or choose another")


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table as parquet."""
    import pyarrow.parquet as pq  # commands that only download or print import this module too

    with replacing(path) as partial:
        pq.write_table(table, partial)


def write_text(text: str, path: Path) -> None:
    """Write a UTF-8 text file."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(content: Any, path: Path) -> None:
    """Write JSON; numpy's numbers and arrays become Python's, and NaN and infinity become null."""
    write_text(json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
