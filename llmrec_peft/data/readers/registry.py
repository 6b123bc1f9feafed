"""The registry of readers, and the function that chooses one for a path."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from llmrec_peft.data.readers.json_records import check_first_record
from llmrec_peft.data.readers.mending import NULL_TIMES, check_names, plain_ids, plain_times
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, shortened

HUB_PREFIX = "hf://"


@dataclass(frozen=True)
class RawLog:
    """What a reader returns: the two tables as found, before `BehaviorLog` checks them, and a name for messages."""

    interactions: pa.Table
    items: pa.Table | None
    name: str


@dataclass(frozen=True)
class Reader:
    """One form of log: its name, its layout in words, how to recognise it and how to read it."""

    name: str
    layout: str
    detect: Callable[[str], bool]
    read: Callable[[str], RawLog]
    local: bool = True


READERS: dict[str, Reader] = {}
"""Name -> reader, in the order in which detection asks them."""


def register(
    name: str, layout: str, detect: Callable[[str], bool], *, local: bool = True
) -> Callable[[Callable[[str], RawLog]], Callable[[str], RawLog]]:
    """Decorator that puts a reading function in the registry."""

    def add(read: Callable[[str], RawLog]) -> Callable[[str], RawLog]:
        READERS[name] = Reader(name, layout, detect, read, local)
        return read

    return add


def describe_formats() -> str:
    """The supported forms on one line: `directory (interactions...), movielens (...), ...`."""
    return "; ".join(f"{reader.name} ({reader.layout})" for reader in READERS.values())


def detect_format(path: str | Path) -> str:
    """The name of the one reader that recognises the path.

    Raises:
        DataError: no reader does, or more than one; the message says what was found and what is supported.
    """
    text = str(path)
    if not text.startswith(HUB_PREFIX) and not _exists(text):
        raise DataError(
            f"data path {shortened(text)!r} does not exist; give a directory or file, "
            f"or {HUB_PREFIX}owner/name (or format='hub') for a data set on the Hub"
        )
    names = [reader.name for reader in READERS.values() if reader.detect(text)]
    if len(names) == 1:
        return names[0]
    if names:
        raise DataError(f"data path {shortened(text)!r} looks like {listed(names)}; say which with format=")
    if not text.startswith(HUB_PREFIX):
        check_first_record(Path(text))
    raise DataError(
        f"no reader knows {shortened(text)!r}, which {_found(Path(text))}; supported are {describe_formats()}"
    )


def read_raw_log(path: str | Path, *, format: str = "auto", null_times: str = "refuse") -> RawLog:
    """Read the two tables of a log, with column names, times and ids that `mending` has brought to one spelling.

    `BehaviorLog.read` is the only caller: it checks the tables and turns a library's errors into DataError.

    Args:
        path, format, null_times: see `BehaviorLog.read`.

    Raises:
        DataError: the format is unknown or not detected, the files are damaged, or names, times or ids are ambiguous.
    """
    if null_times not in NULL_TIMES:
        raise DataError(f"null_times {null_times!r} is not one of {listed(list(NULL_TIMES))}; name one of these")
    raw = _read_raw(path, format)
    check_names(raw.interactions, ("user_id", "item_id", "timestamp"), f"interactions of log {raw.name!r}")
    if raw.items is not None:
        check_names(raw.items, ("item_id", "title"), f"items of log {raw.name!r}")
    interactions = plain_times(raw.interactions, raw.name, null_times)
    interactions, items = plain_ids(interactions, raw.items, raw.name)
    return RawLog(interactions, items, raw.name)


def _read_raw(path: str | Path, format: str) -> RawLog:
    name = detect_format(path) if format == "auto" else format
    if name not in READERS:
        raise DataError(f"format {name!r} is not one of auto, {listed(list(READERS))}; name one of these")
    reader = READERS[name]
    if reader.local and not _exists(path):
        raise DataError(f"data path {shortened(path)!r} does not exist; the {name} reader needs {reader.layout}")
    return reader.read(str(path))


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError as error:  # a name too long, a directory that may not be searched
        raise DataError(f"data path {shortened(path)!r} cannot be opened ({error.strerror}); correct it") from None


def log_name(path: str | Path) -> str:
    """What messages call a log: the last part of its path."""
    return os.path.basename(os.path.realpath(path)) or str(path)


def _found(path: Path) -> str:
    if path.is_file():
        return f"is a file of {path.stat().st_size} bytes"
    if not path.is_dir():
        return "is neither a file nor a directory"
    names = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"holds {listed(names[:8])}{more}" if names else "is an empty directory"
