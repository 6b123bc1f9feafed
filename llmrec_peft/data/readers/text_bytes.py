"""Open text files, plain or gzipped, and find the line that is not UTF-8."""

import gzip
import zlib
from pathlib import Path
from typing import IO, Any

from llmrec_peft.errors import DataError

BLOCK_BYTES = 64 << 20
"""Most bytes of a single row of csv or jsonl; titles of a million characters fit."""
UNREADABLE = (OSError, EOFError, zlib.error)
"""Exceptions of reading a truncated, damaged or missing file."""


def open_bytes(path: Path) -> IO[bytes]:
    """A file opened for reading bytes, unpacked if its name ends with .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def open_text(path: Path, errors: str = "strict", newline: str | None = None) -> Any:
    """A file opened for reading UTF-8, with or without a byte-order mark, unpacked if its name ends with .gz."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", errors=errors, newline=newline)


def first_line(path: Path, limit: int = 4096) -> str:
    """The start of a file's first line, or "" if it cannot be read; bytes that are not UTF-8 are replaced."""
    try:
        with open_bytes(path) as file:
            line = file.readline(limit)
    except UNREADABLE:
        return ""
    return line.decode("utf-8-sig", "replace").strip("\r\n")


def check_utf8(path: Path) -> None:
    """Raise DataError naming the first line of a text file that is not UTF-8; pass if all lines are UTF-8."""
    with open_bytes(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} is not UTF-8: line {number} holds the byte 0x{line[error.start]:02x}; "
                        "save the file as UTF-8"
                    ) from error
        except UNREADABLE:
            return  # damaged compression is reported by the caller
