"""Validate and normalise the two tables of a log: interactions and items.

All functions are vectorised Arrow or NumPy calls; none loops over rows in Python.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.templates import OUTCOME_COLUMNS
from llmrec_peft.data.times import to_seconds
from llmrec_peft.data.titles import SEEN
from llmrec_peft.errors import DataError, one_line
from llmrec_peft.messages import listed, quoted

ID_TYPE = pa.large_string()
SHOWN = 5
"""Rows or ids that a message names, at most."""


def offenders(mask: np.ndarray) -> tuple[int, np.ndarray]:
    """The number of true entries of a boolean array, and the positions of the first `SHOWN`."""
    rows = np.flatnonzero(mask)
    return len(rows), rows[:SHOWN]


def numbered(rows: np.ndarray, count: int, noun: str = "row") -> str:
    """`row 7` or `rows 7, 9, 12, ...`; rows are counted from 0."""
    shown = ", ".join(str(int(row)) for row in rows)
    return f"{noun}{'s' if count > 1 else ''} {shown}{', ...' if count > len(rows) else ''}"


def bool_numpy(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A boolean Arrow column without nulls as a NumPy array."""
    return np.asarray(values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy())


def as_ids(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """An id column as strings; whole numbers in a float column lose their ".0".

    Raises:
        DataError: the column is of a type that cannot name a user or an item.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_ids(column.cast(kind.value_type), where)
    if kind == ID_TYPE:
        return column
    try:
        if pa.types.is_floating(kind):
            column = _whole(column, where)
        elif not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_string_view(kind)):
            raise pa.ArrowInvalid(f"type {kind}")
        return column.cast(ID_TYPE)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where} must be strings or whole numbers, got {kind}; write the ids as strings") from error


def _whole(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Float ids as whole numbers. Raises DataError for NaN, and for numbers so large that a float rounds them."""
    exact = 2 ** (np.finfo(column.type.to_pandas_dtype()).nmant + 1)
    column = column.cast(pa.float64())
    for bad, rule in (
        (pc.is_nan(column), "is NaN"),
        (pc.greater(pc.abs(column), exact), f"is a float above {exact:,}, where floats round ids,"),
    ):
        count, rows = offenders(bool_numpy(pc.fill_null(bad, False)))
        if count:
            raise DataError(
                f"{where} {rule} in {count} rows ({numbered(rows, count)}); ids must be strings or whole numbers: "
                "write them as strings, and drop or fill rows without one"
            )
    return column.cast(pa.int64())


def check_texts(table: pa.Table | pa.RecordBatch, where: str, advice: str = "write the texts as UTF-8") -> None:
    """Raise DataError if a column of texts, or of lists of texts, holds bytes that are not UTF-8."""
    for place, name in enumerate(table.schema.names):
        column = table.column(place)
        if pa.types.is_primitive(column.type) or pa.types.is_binary(column.type):
            continue
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(f"column {quoted(name)} of {where} is damaged ({one_line(error)}); {advice}") from None


def check_columns(table: pa.Table, needed: tuple[str, ...], where: str) -> None:
    """Raise DataError if a needed column is missing or a column name appears twice."""
    repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if repeated:
        raise DataError(f"{where} has column {listed(repeated)} more than once; rename or drop the repeats")
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise DataError(
            f"{where} lacks the column {listed(missing)}; it has {listed(table.column_names)}; rename or add columns"
        )


def is_blank(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Which texts are null or have no visible character; see `titles.is_unseen`."""
    return pc.invert(pc.fill_null(pc.match_substring_regex(texts, SEEN), False))


def check_ids(ids: pa.ChunkedArray, where: str) -> None:
    """Raise DataError if an id is null, empty, or has no visible character."""
    if ids.null_count:
        count, rows = offenders(bool_numpy(ids.is_null()))
        raise DataError(f"{where} is null in {count} rows ({numbered(rows, count)}); drop or fill these rows")
    # The distinct ids first: a log has far fewer of them than rows.
    if pc.any(is_blank(pc.unique(ids))).as_py():
        blank = is_blank(ids)
        count, rows = offenders(bool_numpy(blank))
        raise DataError(
            f"{where} is an empty string in {count} rows ({numbered(rows, count)}), or none of its characters can be "
            "seen; drop or fill these rows"
        )


def prepare_items(items: pa.Table, name: str) -> pa.Table:
    """The item table with `item_id` and `title` as strings, each item once and with a text.

    Raises:
        DataError: a missing column, an empty table, a null, empty or repeated id, an item without a title, bytes that
            are not UTF-8.
    """
    where = f"items of log {name!r}"
    check_columns(items, ("item_id", "title"), where)
    if not items.num_rows:
        raise DataError(f"{where} has no rows; give at least one item with item_id and title")
    check_texts(items, where)
    ids = as_ids(items.column("item_id"), f"item_id in {where}")
    check_ids(ids, f"item_id in {where}")
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(repeated):
        first = listed([quoted(value) for value in repeated.slice(0, SHOWN).to_pylist()])
        raise DataError(f"{where} has {len(repeated)} ids in more than one row (first: {first}); keep one row an item")
    title = items.column("title")
    if pa.types.is_dictionary(title.type):
        title = title.cast(title.type.value_type)
    if not pa.types.is_null(title.type) and not is_text(title.type):
        raise DataError(f"title in {where} must be text, got {title.type}; write the titles as strings")
    title = title.cast(ID_TYPE)
    blank = is_blank(title)
    if pc.any(blank).as_py():
        count, rows = offenders(bool_numpy(blank))
        first = listed([quoted(value) for value in ids.take(rows).to_pylist()])
        raise DataError(
            f"{where} has {count} items without a title (first: {first}), null, empty or without a visible character; "
            "give each a text or drop them"
        )
    items = items.set_column(items.column_names.index("item_id"), "item_id", ids)
    return items.set_column(items.column_names.index("title"), "title", title).combine_chunks()


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def prepare_interactions(table: pa.Table, name: str) -> tuple[pa.Table, np.ndarray]:
    """The interactions with string ids, and their timestamps as seconds.

    Returns:
        The table in its given order, its `timestamp` column in seconds (or in numbers that only define an
        order, see `data.times`), and the same numbers as an array [rows], int64 or float64.

    Raises:
        DataError: a missing column, an empty log, a null or empty id, a bad timestamp (see `times.to_seconds`), bytes
            that are not UTF-8, `context_only` of a wrong type.
    """
    where = f"interactions of log {name!r}"
    check_columns(table, ("user_id", "item_id", "timestamp"), where)
    if not any(column in table.column_names for column in OUTCOME_COLUMNS):
        raise DataError(
            f"{where} needs one of {listed(list(OUTCOME_COLUMNS))}; it has {listed(table.column_names)}; "
            "add the column that says what the user did"
        )
    if not table.num_rows:
        raise DataError(f"{where} has no rows; a log needs at least one interaction")
    check_texts(table, where)
    for column in ("user_id", "item_id"):
        ids = as_ids(table.column(column), f"{column} in {where}")
        check_ids(ids, f"{column} in {where}")
        table = table.set_column(table.column_names.index(column), column, ids)
    seconds = to_seconds(table.column("timestamp"), where)
    table = table.set_column(table.column_names.index("timestamp"), "timestamp", pa.chunked_array([seconds]))
    if "context_only" in table.column_names:
        table = _fix_context_only(table, where)
    return table, seconds


def _fix_context_only(table: pa.Table, where: str) -> pa.Table:
    column = table.column("context_only")
    try:
        flags = pc.fill_null(column.cast(pa.bool_()), False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"context_only in {where} must be true or false, got {column.type}; use a boolean") from error
    return table.set_column(table.column_names.index("context_only"), "context_only", flags)
