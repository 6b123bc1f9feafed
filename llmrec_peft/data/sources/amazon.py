"""Amazon Reviews 2023: a jsonl of reviews and, beside it, `meta_<the same name>` with the items.

Source of the layout: Hou et al. 2024, "Bridging Language and Items for Retrieval and Recommendation" (2403.03952), and
amazon-reviews-2023.github.io.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from llmrec_peft.data.sources.records import first_keys, is_json, read_records
from llmrec_peft.data.sources.registry import RawLog, log_name, register
from llmrec_peft.data.sources.tabular import BLOCK_BYTES, check_utf8, complete_items, one_line
from llmrec_peft.data.spool import collect
from llmrec_peft.errors import DataError

REVIEW_KEYS = {"user_id", "parent_asin", "rating", "timestamp"}
REVIEW_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("parent_asin", pa.string()),
        ("timestamp", pa.int64()),
        ("rating", pa.float64()),
        ("verified_purchase", pa.bool_()),
    ]
)
ITEM_TEXTS = ("title", "main_category", "store", "categories", "features")
ITEM_SCHEMA = pa.schema(
    [("item_id", pa.large_string()), *((name, pa.large_string()) for name in ITEM_TEXTS), ("price", pa.float64())]
)


def _review_files(path: str) -> list[Path]:
    place = Path(path)
    found = [place] if is_json(place) else sorted(e for e in place.glob("*") if is_json(e)) if place.is_dir() else []
    return [entry for entry in found if first_keys(entry) >= REVIEW_KEYS]


@register("amazon_reviews_2023", "Name.jsonl[.gz] with meta_Name.jsonl[.gz]", lambda path: bool(_review_files(path)))
def read_amazon(path: str) -> RawLog:
    """Read one category of Amazon Reviews 2023; an item is a `parent_asin`, a time is in seconds.

    Left out on purpose: the text, title and votes of a review, which come after its rating, and an item's average
    rating and count, which were taken after all of them. Items without metadata or title keep their id as their title.

    Raises:
        DataError: no reviews, more than one file of them, or a damaged file.
    """
    files = _review_files(path)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path} holds {len(files)} files of Amazon reviews ({names}); name the one to read")
    reviews = collect(_review_batches(files[0]), REVIEW_SCHEMA)
    if not reviews.num_rows:
        raise DataError(f"{files[0]} holds no reviews; download it again")
    interactions = reviews.rename_columns(["item_id" if n == "parent_asin" else n for n in reviews.column_names])
    if not reviews.column("timestamp").null_count:
        seconds = pa.chunked_array([reviews.column("timestamp").to_numpy() / np.float64(1000.0)])
        interactions = interactions.set_column(2, "timestamp", seconds)
    stem = re.sub(r"\.jsonl?(\.gz)?$", "", files[0].name, flags=re.IGNORECASE)
    metas = [entry for entry in sorted(files[0].parent.glob(f"meta_{stem}.*")) if is_json(entry)]
    items = collect(_item_batches(metas[0]), ITEM_SCHEMA) if metas else ITEM_SCHEMA.empty_table()
    return RawLog(interactions, complete_items(items, interactions, log_name(path)), log_name(path))


def _review_batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pa.input_stream(str(path)) as stream:
            yield from pajson.open_json(
                stream,
                read_options=pajson.ReadOptions(block_size=BLOCK_BYTES),
                parse_options=pajson.ParseOptions(explicit_schema=REVIEW_SCHEMA, unexpected_field_behavior="ignore"),
            )
    except (pa.ArrowException, OSError, EOFError) as error:
        check_utf8(path)
        raise DataError(f"{path} is not readable JSON lines: {one_line(error)}; download it again") from error


def _item_batches(path: Path) -> Iterator[pa.RecordBatch]:
    rows: list[dict[str, Any]] = []
    for record in read_records(path):
        row = {name: _text(record.get(name)) for name in ITEM_TEXTS}
        rows.append({"item_id": record.get("parent_asin"), "price": _price(record.get("price")), **row})
        if len(rows) == 10_000:
            yield pa.RecordBatch.from_pylist(rows, schema=ITEM_SCHEMA)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=ITEM_SCHEMA)


def _text(value: Any) -> str | None:
    """Lists of texts joined by "; "; anything but a text or a list as no text."""
    if isinstance(value, list):
        return "; ".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else None


def _price(value: Any) -> float | None:
    """Dollars; texts such as "from 12.99" give their number, "—" gives none."""
    found = re.search(r"\d+(?:,\d{3})*(?:\.\d+)?", str(value)) if value is not None else None
    return float(found.group().replace(",", "")) if found else None
