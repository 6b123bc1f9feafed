"""Files written whole or not at all: under a temporary name beside their place, and then moved into it."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the temporary name to write to; it takes the place of `path` at the end, and is gone after an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table as parquet."""
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
