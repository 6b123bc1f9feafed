"""Arrow files with a checksum of their contents, so that a truncated or edited cache file is never read.

Columns are numbers, or lists of one length, without nulls. The checksum is the SHA-256 of the owner's digest and of
each column's name, type, lengths and bytes, in the order of the columns.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmrec_peft.errors import DataError, input_errors
from llmrec_peft.files import replacing

_KEY = b"llmrec_peft.sha256"
ADVICE = "delete the file and run again to recompute it"


def write_cached(table: pa.Table, path: Path, owner: str) -> None:
    """Write a table, whole or not at all.

    Args:
        owner: digest of what the table was computed from; `read_cached` refuses a file of another owner.
    """
    table = table.combine_chunks().replace_schema_metadata({})
    table = table.replace_schema_metadata({_KEY: _checksum(table, owner).encode()})
    with (
        replacing(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def read_cached(path: Path, owner: str) -> pa.Table:
    """Read a table that `write_cached` wrote.

    Raises:
        DataError: the file is truncated or edited, or belongs to another owner.
    """
    with input_errors(DataError, f"cached teacher output {path}", ADVICE):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all().combine_chunks()
        found, stored = _checksum(table, owner), (table.schema.metadata or {}).get(_KEY, b"none").decode()
    if found != stored:
        raise DataError(
            f"{path} has the SHA-256 {found[:16]}..., but states {stored[:16]}..., so it was truncated or edited, or "
            f"belongs to another teacher; {ADVICE}"
        )
    return table


def matrix(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one length as an array [rows, length]."""
    column = table.column(name).combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def list_column(values: np.ndarray) -> pa.Array:
    """An array [rows, length] as a column of lists of one length; the reverse of `matrix`."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _checksum(table: pa.Table, owner: str) -> str:
    checksum = hashlib.sha256(owner.encode())
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        if column.null_count:
            raise DataError(f"column {field.name!r} has nulls")
        values = column.flatten() if pa.types.is_fixed_size_list(field.type) else column
        checksum.update(f"{field.name}:{field.type}:{len(column)}:{len(values)};".encode())
        checksum.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).data)
    return checksum.hexdigest()
