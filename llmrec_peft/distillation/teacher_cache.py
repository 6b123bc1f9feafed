"""Arrow files that know the digest of what they hold, so that a part that was cut or edited is never read.

Columns are numbers without nulls; their bytes are hashed in the order of the columns, with the digest of what the file
belongs to.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmrec_peft.errors import DataError, input_errors
from llmrec_peft.files import replacing

_KEY = b"llmrec_peft.sha256"
ADVICE = "remove the file, and the teacher is asked for it again"


def write_kept(table: pa.Table, path: Path, owner: str) -> None:
    """Write a table, whole or not at all.

    Args:
        owner: digest of what it belongs to; a file of another owner is not read.
    """
    table = table.combine_chunks().replace_schema_metadata({})
    table = table.replace_schema_metadata({_KEY: _digest(table, owner).encode()})
    with (
        replacing(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def read_kept(path: Path, owner: str) -> pa.Table:
    """The table of a file that `write_kept` wrote.

    Raises:
        DataError: it was cut or edited, or belongs to something else.
    """
    with input_errors(DataError, f"{path}, an answer that was kept,", ADVICE):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all().combine_chunks()
        found, said = _digest(table, owner), (table.schema.metadata or {}).get(_KEY, b"none").decode()
    if found != said:
        raise DataError(
            f"{path} has the SHA-256 {found[:16]}..., but says {said[:16]}..., so it was cut or edited, or is another "
            f"teacher's; {ADVICE}"
        )
    return table


def matrix(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one length as an array [rows, length]."""
    column = table.column(name).combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _digest(table: pa.Table, owner: str) -> str:
    found = hashlib.sha256(owner.encode())
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        if column.null_count:
            raise DataError(f"column {field.name!r} lacks a value")
        values = column.flatten() if pa.types.is_fixed_size_list(field.type) else column
        found.update(f"{field.name}:{field.type}:{len(column)}:{len(values)};".encode())
        found.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).data)
    return found.hexdigest()
