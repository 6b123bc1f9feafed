"""Files of ids, such as users or candidates, and the fingerprint of a table."""

import hashlib
from pathlib import Path

import pyarrow as pa

from llmrec_peft.data.readers.mending import ids_as_known
from llmrec_peft.data.readers.tabular import SUFFIXES, read_tables, suffix_of
from llmrec_peft.data.tables import ID_TYPE, as_ids, check_columns
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed

HASHED_AT_ONCE = 65_536  # rows


def read_ids(path: str, what: str, column: str, known: pa.Array | pa.ChunkedArray, of: str) -> pa.Table:
    """Read a table whose `column` holds ids, as text in the spelling of the `known` ids.

    Args:
        path: path of the file.
        what: the setting that names the file, for messages.
        column: name of the column of ids.
        known: the ids of the log.
        of: source of the known ids, for messages.

    Raises:
        DataError: no such file, no such column, no row, or ids that pandas wrote with .0 in some rows only.
    """
    file = Path(path)
    if not file.is_file() or suffix_of(file) is None:
        raise DataError(f"{what} must be an existing file ({listed(list(SUFFIXES))}), not {path!r}; give one")
    table = read_tables([file])
    check_columns(table, (column,), f"{what} {path}")
    if not table.num_rows:
        raise DataError(f"{what} {path} has no rows; give at least one {column}")
    table = ids_as_known(table, column, known, f"{what} {path}", of)
    values = table.column(column)
    ids = values.cast(ID_TYPE) if pa.types.is_null(values.type) else as_ids(values, f"{column} in {what} {path}")
    return table.set_column(table.column_names.index(column), column, ids)


def table_fingerprint(table: pa.Table) -> str:
    """Hash of a table's values; files, chunks and Arrow types of the same values do not change it."""
    digest = hashlib.sha256(repr(table.column_names).encode())
    for name in table.column_names:
        for start in range(0, table.num_rows, HASHED_AT_ONCE):
            values = table.column(name).slice(start, HASHED_AT_ONCE).to_pylist()
            digest.update(repr(values).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
