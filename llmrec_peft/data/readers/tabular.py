"""Read tables from parquet, csv or jsonl files, and complete published item tables."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from llmrec_peft.data.memory_mapped import BATCH_ROWS, collect
from llmrec_peft.data.readers.csv_files import read_text_csv, typed_columns
from llmrec_peft.data.readers.json_lines import read_jsonl
from llmrec_peft.data.readers.mending import meeting_ids
from llmrec_peft.data.tables import ID_TYPE, check_texts, is_blank
from llmrec_peft.errors import DataError, one_line
from llmrec_peft.messages import listed

_log = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")


def suffix_of(path: Path) -> str | None:
    """The suffix from `SUFFIXES` that the file name ends with, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_tables(paths: Sequence[Path]) -> pa.Table:
    """Shards of one table, in one format, as one Arrow table; parquet above `MAPPED_ROWS` rows is memory-mapped."""
    if all(suffix_of(path) == ".parquet" for path in paths):
        return read_parquet(paths)
    # All shards together determine the type of a csv column: the first leading zero may be in the last of them.
    is_csv = (suffix_of(paths[0]) or "").startswith(".csv")
    parts = [read_text_csv(path) if is_csv else read_jsonl(path) for path in paths]
    try:
        table = parts[0] if len(parts) == 1 else pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{listed([path.name for path in paths])} do not fit together: {one_line(error)}") from error
    return typed_columns(table) if is_csv else table


def read_parquet(paths: Sequence[Path]) -> pa.Table:
    """Parquet files with one schema, batch by batch, ids as strings and dictionaries as their values.

    Arrow reads the bytes of a text as they are. They are checked here too, where the file can be named.

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
                "all shards of a table need the same columns"
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
                    check_texts(batch, str(path), "write it again")
                    yield batch.cast(schema) if batch.schema != schema else batch
                    bar.update(batch.num_rows)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{path} is a parquet file that cannot be read: {one_line(error)}; write it again"
                ) from error


def _plain(schema: pa.Schema) -> pa.Schema:
    """Dictionary columns as their values, and string ids as large strings, as in a log."""
    fields = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if field.name in ("user_id", "item_id") and pa.types.is_string(kind):
            kind = ID_TYPE
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


def fill_blank_titles(items: pa.Table) -> tuple[pa.Table, int]:
    """Items with the id as the title where the title is null or blank; also returns how many."""
    title = items.column("title").cast(ID_TYPE)
    blank = is_blank(title)
    filled = pc.if_else(blank, items.column("item_id").cast(ID_TYPE), title)
    return items.set_column(items.column_names.index("title"), "title", filled), pc.sum(blank).as_py() or 0


def attach_users(interactions: pa.Table, users: pa.Table, path: Path) -> pa.Table:
    """The interactions with the columns of a user table, null for users that it lacks, with a warning that counts them.

    A column whose name the interactions already have becomes `user_<name>`.

    Raises:
        DataError: ids with and without ".0" whose match is ambiguous.
    """
    interactions, users = meeting_ids(interactions, users, "user_id", f"interactions of {path.parent}", str(path))
    met = pc.unique(interactions.column("user_id")).drop_null()
    known = users.column("user_id").combine_chunks()
    strangers = len(met) - (pc.sum(pc.is_in(met, value_set=known)).as_py() or 0)
    if strangers:
        _log.warning("%s: %d of %d users have no row; its columns are empty for them", path, strangers, len(met))
    rows = pc.index_in(interactions.column("user_id"), value_set=known)
    for name in users.column_names:
        if name != "user_id":
            label = f"user_{name}" if name in interactions.column_names else name
            interactions = interactions.append_column(label, users.column(name).take(rows))
    return interactions


def complete_items(items: pa.Table, interactions: pa.Table, name: str, counted: str = "") -> pa.Table:
    """Complete a published item table: the first row of each item, ids for missing titles, rows for missing items.

    Warnings count the repairs.

    Args:
        counted: what the warning adds about the interactions, if they are only a part.
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
            "log %r: %d of %d items have no metadata%s; their ids are their titles",
            name,
            len(unknown),
            len(used),
            counted,
        )
        missing = pa.table({"item_id": unknown, "title": unknown})
        items = pa.concat_tables([items, missing], promote_options="permissive")
    items, blank = fill_blank_titles(items)
    if blank:
        _log.warning("log %r: %d items have no title; their ids are their titles", name, blank)
    return items
