"""Parquet, csv and jsonl files as Arrow tables, with errors that name the file."""

import gzip
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from llmrec_peft.data.spool import BATCH_ROWS, collect
from llmrec_peft.data.tables import ID_TYPE, is_blank, listed
from llmrec_peft.errors import DataError, one_line

_log = logging.getLogger(__name__)

BLOCK_BYTES = 64 << 20
"""A single row of csv or jsonl may be as long as this; titles of a million characters fit."""

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
TEXT_IDS = {"user_id": pa.string(), "item_id": pa.string(), "title": pa.string()}


def suffix_of(path: Path) -> str | None:
    """The suffix from `SUFFIXES` that the file name ends with, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_tables(paths: Sequence[Path]) -> pa.Table:
    """Files of one kind, parts of one table, as one Arrow table; parquet above `SPOOL_ROWS` rows is memory-mapped."""
    if all(suffix_of(path) == ".parquet" for path in paths):
        return read_parquet(paths)
    parts = [read_csv(path) if ".csv" in path.name.lower() else read_jsonl(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{listed([path.name for path in paths])} do not fit together: {one_line(error)}") from error


def read_parquet(paths: Sequence[Path]) -> pa.Table:
    """Parquet files with one schema, batch by batch, ids as strings and dictionaries as their values.

    Raises:
        DataError: a file is damaged or its columns differ from those of the first.
    """
    files = []
    for path in paths:
        try:
            files.append(pq.ParquetFile(path, memory_map=True))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable parquet file: {one_line(error)}; write it again") from error
    schema = _plain(files[0].schema_arrow)
    for path, file in zip(paths, files, strict=True):
        if file.schema_arrow.names != schema.names:
            raise DataError(
                f"{path} has columns {listed(file.schema_arrow.names)} but {paths[0].name} has {listed(schema.names)}; "
                "all parts of a table need the same columns"
            )
    return collect(_parquet_batches(paths, files, schema), schema)


def _parquet_batches(
    paths: Sequence[Path], files: Sequence[pq.ParquetFile], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    rows = sum(file.metadata.num_rows for file in files)
    with tqdm(total=rows, unit="row", unit_scale=True, desc="reading parquet", delay=2) as bar:
        for path, file in zip(paths, files, strict=True):
            try:
                for batch in file.iter_batches(batch_size=BATCH_ROWS):
                    yield batch.cast(schema) if batch.schema != schema else batch
                    bar.update(batch.num_rows)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{path} is a parquet file that cannot be read: {one_line(error)}; write it again"
                ) from error


def _plain(schema: pa.Schema) -> pa.Schema:
    """Dictionary columns as their values, and string ids as large strings, as the log keeps them."""
    fields = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if field.name in ("user_id", "item_id") and pa.types.is_string(kind):
            kind = ID_TYPE
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


def read_csv(
    path: Path,
    *,
    delimiter: str = ",",
    quoted: bool = True,
    names: Sequence[str] | None = None,
    types: dict[str, pa.DataType] | None = None,
    columns: Sequence[str] | None = None,
    encoding: str = "utf8",
    skip_rows: int = 0,
) -> pa.Table:
    """A csv file, with a header unless `names` are given; ids and titles stay text, so "007" keeps its zeros.

    Raises:
        DataError: the file is empty, not in the encoding, or not a table.
    """
    try:
        return pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(
                block_size=BLOCK_BYTES, column_names=names, encoding=encoding, skip_rows=skip_rows
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=TEXT_IDS if types is None else types, include_columns=columns or []
            ),
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError, EOFError) as error:
        if encoding == "utf8":
            check_utf8(path)
        raise DataError(f"{path} is not a readable csv file: {one_line(error)}; correct or write it again") from error


def read_jsonl(path: Path) -> pa.Table:
    """A file of one JSON object a line, ids that are numbers included.

    Raises:
        DataError: the file is empty, not UTF-8, or not JSON.
    """
    try:
        with pa.input_stream(str(path)) as stream:
            table = pajson.read_json(stream, read_options=pajson.ReadOptions(block_size=BLOCK_BYTES))
    except (pa.ArrowException, OSError, EOFError) as error:
        check_utf8(path)
        raise DataError(f"{path} is not readable JSON lines: {one_line(error)}; correct or write it again") from error
    for name in table.column_names:
        if pa.types.is_string(table.schema.field(name).type):
            _check_text(table.column(name), name, path)
    return table


def _check_text(column: pa.ChunkedArray, name: str, path: Path) -> None:
    # The JSON reader takes bytes as they come; invalid UTF-8 would surface much later, far from its file.
    try:
        column.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid as error:
        check_utf8(path)
        raise DataError(f"column {name} of {path} is not UTF-8 text; save the file as UTF-8") from error


def check_utf8(path: Path) -> None:
    """Raise DataError naming the first line of a text file that is not UTF-8; pass if there is none."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} is not UTF-8: line {number} holds the byte 0x{line[error.start]:02x}; "
                        "save the file as UTF-8"
                    ) from error
        except (OSError, EOFError):
            return  # damaged compression is reported by the caller


def fill_blank_titles(items: pa.Table) -> tuple[pa.Table, int]:
    """Items whose title is null or blank take their id as the title; also returns how many did."""
    title = items.column("title").cast(ID_TYPE)
    blank = is_blank(title)
    filled = pc.if_else(blank, items.column("item_id").cast(ID_TYPE), title)
    return items.set_column(items.column_names.index("title"), "title", filled), pc.sum(blank).as_py() or 0


def attach_users(interactions: pa.Table, users: pa.Table) -> pa.Table:
    """The interactions with the columns of a user table, null for users that it lacks.

    A column whose name the interactions have already is called `user_<name>`.
    """
    rows = pc.index_in(interactions.column("user_id"), value_set=users.column("user_id").combine_chunks())
    for name in users.column_names:
        if name != "user_id":
            label = f"user_{name}" if name in interactions.column_names else name
            interactions = interactions.append_column(label, users.column(name).take(rows))
    return interactions


def complete_items(items: pa.Table, interactions: pa.Table, name: str) -> pa.Table:
    """A published item table made whole: the first row of each item, ids for missing titles, rows for missing items.

    Public dumps break these rules often; what was mended is logged as a warning, with counts.
    """
    ids = items.column("item_id").cast(ID_TYPE)
    distinct = pc.unique(ids)
    if len(distinct) < len(ids):
        _log.warning("log %r: %d repeated rows of items dropped", name, len(ids) - len(distinct))
        items = items.take(pc.index_in(distinct, value_set=ids.combine_chunks()))
    used = pc.unique(interactions.column("item_id").cast(ID_TYPE)).drop_null()
    unknown = used.filter(pc.invert(pc.is_in(used, value_set=distinct)))
    if len(unknown):
        _log.warning(
            "log %r: %d of %d items have no metadata; their ids are their titles", name, len(unknown), len(used)
        )
        missing = pa.table({"item_id": unknown, "title": unknown})
        items = pa.concat_tables([items, missing], promote_options="permissive")
    items, blank = fill_blank_titles(items)
    if blank:
        _log.warning("log %r: %d items have no title; their ids are their titles", name, blank)
    return items
