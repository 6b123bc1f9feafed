"""Csv files as Arrow tables, with errors that name the file; columns are typed by `csv_rules`."""

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from llmrec_peft.data.csv_rules import NULLS, NUMBER, TEXTS, TRUTH, WHOLE, delimiter_of
from llmrec_peft.data.readers.text_bytes import BLOCK_BYTES, UNREADABLE, check_utf8, first_line, open_text
from llmrec_peft.data.tables import bool_numpy, offenders
from llmrec_peft.errors import DataError, one_line
from llmrec_peft.messages import quoted

_log = logging.getLogger(__name__)

_MISFIT = re.compile(r"In CSV column #(\d+)\b.*?conversion error")
_FLOAT = r"^ *[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+|inf)(?:[eE][-+]?[0-9]+)? *$"
_ERRORS = (pa.ArrowException, UnicodeDecodeError, csv.Error, *UNREADABLE)


def read_csv(
    path: Path,
    *,
    types: dict[str, pa.DataType],
    delimiter: str = ",",
    quoted: bool = True,
    names: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    skip_rows: int = 0,
    loose: Sequence[str] = (),
) -> pa.Table:
    """A csv file of known columns, with a header unless `names` are given.

    Args:
        path: the file, which may be gzipped.
        types: Arrow type of each column.
        delimiter: the separator.
        quoted: whether fields may be quoted, and then hold line breaks.
        names: column names of a file without a header.
        columns: the columns to keep, in order; all if None.
        skip_rows: lines before the data, or before the header.
        loose: columns that are read as text if a value does not fit its type, with a warning, except for `timestamp`,
            whose texts `mending` parses.

    Raises:
        DataError: the file is empty, not UTF-8, or not such a table.
    """
    types = dict(types)
    declared: dict[str, pa.DataType] = {}
    while True:
        try:
            table = pacsv.read_csv(
                path,
                read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES, column_names=names, skip_rows=skip_rows),
                parse_options=pacsv.ParseOptions(
                    delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
                ),
                convert_options=pacsv.ConvertOptions(column_types=types, include_columns=columns or []),
            )
        except _ERRORS as error:
            name = _misfit(error, names, path, delimiter)
            if name is None or name not in loose or types.get(name) == pa.string():
                raise _unreadable(path, error) from error
            declared[name], types[name] = types[name], pa.string()
            continue
        for name in declared.keys() & set(table.column_names) - {"timestamp"}:
            _warn_loose(table.column(name), name, declared[name], path)
        return table


def _warn_loose(column: pa.ChunkedArray, name: str, kind: pa.DataType, path: Path) -> None:
    """Warn how many values of a column did not fit its declared type, and name the first row."""
    known = pc.or_(pc.match_substring_regex(column, _FLOAT), pc.is_in(column, value_set=pa.array(sorted(NULLS))))
    wrong = bool_numpy(pc.invert(pc.fill_null(known, True)))
    count, rows = offenders(wrong)
    first = int(rows[0]) if count else 0
    _log.warning(
        "%s: column %s does not hold %s alone: %d of its %d values do not fit, the first in row %d (%s); read as text",
        path, name, kind, count, len(column), first, quoted(column[first].as_py()),
    )  # fmt: skip


def open_csv(path: Path, schema: pa.Schema, *, delimiter: str = ",", quoted: bool = True) -> Iterator[pa.RecordBatch]:
    """Batches of a large csv file without a header, whose columns are those of the schema."""
    try:
        yield from pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES, column_names=schema.names),
            parse_options=pacsv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False),
            convert_options=pacsv.ConvertOptions(column_types=schema),
        )
    except _ERRORS as error:
        raise _unreadable(path, error, "a readable tsv file" if delimiter == "\t" else "a readable csv file",
                          "download it again") from error  # fmt: skip


def read_text_csv(path: Path) -> pa.Table:
    """A csv file with a header, every column as text; see `typed_columns`.

    If the header has no comma, but semicolons, tabs or bars, these are the delimiter; a warning says so.

    Raises:
        DataError: the file is empty, not UTF-8, or not a table.
    """
    try:
        delimiter = delimiter_of(first_line(path))
        names = header_of(path, delimiter)
    except _ERRORS as error:
        raise _unreadable(path, error) from error
    if delimiter != ",":
        _log.warning("%s: the header has no comma; its fields are separated by %r and are read so", path, delimiter)
    return read_csv(path, types=dict.fromkeys(names, pa.string()), delimiter=delimiter)


def header_of(path: Path, delimiter: str) -> list[str]:
    """The names in the first record of a csv file; none if it is empty."""
    with open_text(path, newline="") as file:
        return next(csv.reader(file, delimiter=delimiter), [])


def typed_columns(table: pa.Table) -> pa.Table:
    """A table of texts with its columns as integers, booleans or floats where no value loses information."""
    columns = [
        table.column(place) if name in (*TEXTS, "timestamp") else _typed(table.column(place))
        for place, name in enumerate(table.column_names)
    ]
    return pa.table(columns, names=table.column_names)


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As `csv_rules.typed_values`, chunk by chunk, so that the first values reveal a text column."""
    missing = pa.array(sorted(NULLS))
    kinds: list[tuple[str, pa.DataType]] = [(WHOLE, pa.int64()), (TRUTH, pa.bool_()), (NUMBER, pa.float64())]
    some = blank = False
    for chunk in column.chunks:
        texts = pc.utf8_trim_whitespace(chunk)
        found = texts.filter(pc.invert(pc.fill_null(pc.is_in(texts, value_set=missing), True)))
        some |= bool(len(found))
        blank |= bool(pc.any(pc.not_equal(chunk, "")).as_py())
        for start in (0, 1000):
            part = found.slice(start, 1000) if not start else found.slice(start)
            kinds = [kind for kind in kinds if pc.all(pc.match_substring_regex(part, f"^(?:{kind[0]})$")).as_py()
                     is not False]  # fmt: skip
        if not kinds:
            return column
    if not some:
        return column if blank else pa.chunked_array([pa.nulls(len(column))])
    kind = kinds[0][1]
    parts = []
    for chunk in column.chunks:
        texts = pc.utf8_trim_whitespace(chunk)
        known = pc.if_else(pc.is_in(texts, value_set=missing), None, texts)
        parts.append(_truths(known) if pa.types.is_boolean(kind) else known.cast(kind))
    return pa.chunked_array(parts, type=kind)


def _truths(texts: pa.Array) -> pa.Array:
    return pc.equal(pc.utf8_lower(texts), "true")


def _misfit(error: BaseException, names: Sequence[str] | None, path: Path, delimiter: str) -> str | None:
    """The column that did not convert, by Arrow's message."""
    found = _MISFIT.search(str(error))
    if not found:
        return None
    if names is None:
        try:
            names = header_of(path, delimiter)
        except _ERRORS as fault:  # bytes close to the header that are not UTF-8
            raise _unreadable(path, fault) from fault
    place = int(found.group(1))
    return names[place] if 0 <= place < len(names) else None


def _unreadable(path: Path, error: BaseException, what: str = "a readable csv file", advice: Any = None) -> DataError:
    check_utf8(path)
    return DataError(f"{path} is not {what}: {one_line(error)}; {advice or 'correct or write it again'}")
