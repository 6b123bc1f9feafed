"""Files written whole or not at all."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def partial_name(path: Path) -> Path:
    """The temporary name beside a file, from which it is moved into place."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table as parquet under a temporary name and move it into place."""
    partial = partial_name(path)
    try:
        pq.write_table(table, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a UTF-8 text file under a temporary name and move it into place."""
    partial = partial_name(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
