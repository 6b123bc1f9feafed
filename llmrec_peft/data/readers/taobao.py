"""Taobao's UserBehavior.csv: user, item, category, behaviour and seconds, without a header.

Source of the layout: Zhu et al. 2018, "Learning Tree-based Deep Model for Recommender Systems", and Tianchi.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.memory_mapped import collect
from llmrec_peft.data.readers.csv_files import open_csv
from llmrec_peft.data.readers.registry import RawLog, log_name, register
from llmrec_peft.data.readers.text_bytes import first_line
from llmrec_peft.data.times import EARLIEST, LATEST, check_left_out
from llmrec_peft.errors import DataError

_log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("category", pa.string()),
        ("behaviour", pa.string()),
        ("timestamp", pa.int64()),
    ]
)
FEW, MOST_LEFT_OUT = 10, 0.01
"""The published file has a few times of other centuries; above both limits (rows, fraction) the file is refused."""
_ROW = re.compile(r"^\d+,\d+,\d+,(?:pv|cart|fav|buy),-?\d+$")


def _files(path: str) -> list[Path]:
    place = Path(path)
    found = sorted(place.iterdir()) if place.is_dir() else [place]
    tables = [file for file in found if file.is_file() and file.name.lower().endswith((".csv", ".csv.gz"))]
    return [file for file in tables if _ROW.match(first_line(file))]


@register("taobao", "UserBehavior.csv without a header", lambda path: bool(_files(path)))
def read_taobao(path: str) -> RawLog:
    """Read Taobao's UserBehavior.csv; `behaviour` is pv (a view), cart, fav or buy.

    No titles were published: an item's id is its title, and `category` is the id of its category. Rows whose time lies
    outside 1990 to 2100 are left out if they are few and not times of another unit. Warnings count both.

    Raises:
        DataError: no such file, several, a damaged one, or times that are not seconds.
    """
    files = _files(path)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path} holds {len(files)} files of Taobao's behaviours ({names}); name the one to read")
    name = log_name(path)
    read = left_out = 0

    def rows() -> Iterator[pa.RecordBatch]:
        nonlocal read, left_out
        for batch in open_csv(files[0], SCHEMA):
            times = batch.column("timestamp").drop_null().to_numpy()
            outside = np.flatnonzero((times < EARLIEST) | (times >= LATEST))
            if len(outside):
                check_left_out(times[outside], read + outside, str(files[0]))
            times = batch.column("timestamp")
            read += batch.num_rows
            left_out += len(outside)
            # Rows without a time stay: `null_times` decides whether they are dropped.
            inside = pc.and_(pc.greater_equal(times, EARLIEST), pc.less(times, LATEST))
            yield batch.filter(pc.fill_null(inside, True)) if len(outside) else batch

    table = collect(rows(), SCHEMA)
    if left_out > max(FEW, MOST_LEFT_OUT * read) or left_out == read > 0:
        raise DataError(
            f"{files[0]} has times outside 1990 to 2100 in {left_out} of {read} rows, and the published file in a few "
            f"dozen of 100 million; times are seconds since 1970: correct the column"
        )
    if left_out:
        _log.warning("log %r: %d interactions with times outside 1990 to 2100 left out", name, left_out)
    ids = table.column("item_id").unique()
    first = pc.index_in(ids, value_set=table.column("item_id").combine_chunks())
    items = pa.table({"item_id": ids, "title": ids, "category": table.column("category").take(first)})
    _log.warning("log %r: no titles are published; the ids of its %d items are their titles", name, len(ids))
    return RawLog(table.drop_columns(["category"]), items, name)
