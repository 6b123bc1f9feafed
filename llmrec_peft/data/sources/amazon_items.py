"""Items of Amazon's metadata files: texts as the shop shows them, and prices as numbers."""

import html
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmrec_peft.data.sources.json_lines import warn_halves
from llmrec_peft.data.sources.records import is_json, read_records
from llmrec_peft.data.spool import collect
from llmrec_peft.data.text import replace_surrogates
from llmrec_peft.errors import DataError

BATCH_ITEMS = 10_000
PRICE_CHARACTERS = 40
"""A price that is longer is no price: metadata of 2018 hold pieces of the page's code there."""

# Only with its semicolon is it an entity: `Black&Copper` holds none.
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_GROUPED_BY_SPACES = re.compile(r"^\D*?(\d{1,3}(?: \d{3})+(?:[.,]\d{1,2})?)(?!\d)\D*$")
_PRICE = re.compile(r"\d(?:[\d.,'’]*\d)?")


def find_meta(reviews: Path, stems: list[str]) -> Path | None:
    """The metadata file beside a file of reviews: `meta_<stem>` with one of the suffixes of JSON."""
    found = [file for stem in stems for file in sorted(reviews.parent.glob(f"meta_{stem}.*")) if is_json(file)]
    return found[0] if found else None


def read_items(path: Path | None, key: str, texts: Mapping[str, str]) -> pa.Table:
    """The item table of a metadata file, or an empty one.

    Args:
        path: the file, or None.
        key: name of the item's id in a record.
        texts: column -> name in a record, of the columns that are texts.

    Raises:
        DataError: the file is damaged; the message names the record.
    """
    fields = [("item_id", pa.large_string()), *((name, pa.large_string()) for name in texts), ("price", pa.float64())]
    schema = pa.schema(fields)
    return schema.empty_table() if path is None else collect(_batches(path, key, texts, schema), schema)


def _batches(path: Path, key: str, texts: Mapping[str, str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    rows: list[dict[str, Any]] = []
    halves = 0
    for number, record in enumerate(read_records(path), start=1):
        item = record.get(key)
        if item is not None and not isinstance(item, str):
            raise DataError(f"record {number} of {path} has {key} {item!r:.60}; it must be a text")
        row = {"item_id": item, "price": price_of(record.get("price"))}
        for name, source in texts.items():
            row[name], mended = shown_text(record.get(source))
            halves += mended
        rows.append(row)
        if len(rows) == BATCH_ITEMS:
            yield pa.RecordBatch.from_pylist(rows, schema=schema)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=schema)
    warn_halves(halves, str(path))


def shown_text(value: Any) -> tuple[str | None, int]:
    """A text with its HTML entities as characters, a list of texts joined by "; ", anything else as no text.

    Returns:
        The text, and how many halves of surrogate pairs in it became U+FFFD.
    """
    if isinstance(value, list):
        value = "; ".join(part for part in value if isinstance(part, str))
    if not isinstance(value, str):
        return None, 0
    text = replace_surrogates(value)
    mended = text.count("\ufffd") - value.count("\ufffd")
    return (_ENTITY.sub(lambda found: html.unescape(found.group()), text) if "&" in text else text), mended


def price_of(value: Any) -> float | None:
    """A price as a number: the first of a range, with either decimal sign; "—" gives none.

    The last point or comma is decimal if one or two digits follow it, or if both signs stand there; otherwise it groups
    thousands, but for a single point, which is decimal: `12,99 €` is 12.99 and `$1,299.00 - $1,499.00` is 1299.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    if not isinstance(value, str) or len(value) > PRICE_CHARACTERS:
        return None
    text = re.sub(r"[\u00a0\u202f\u2009]", " ", value)
    grouped = _GROUPED_BY_SPACES.match(text)
    found = _PRICE.search(grouped.group(1).replace(" ", "") if grouped else text)
    if found is None:
        return None
    number = re.sub("['’]", "", found.group())
    signs = re.findall("[.,]", number)
    if not signs:
        return float(number)
    whole, rest = re.split(r"[.,](?=\d*$)", number)
    decimal = len(set(signs)) == 2 or (len(signs) == 1 and (len(rest) != 3 or signs[0] == "." or whole == "0"))
    whole = re.sub("[.,]", "", whole)
    return float(f"{whole}.{rest}" if decimal else whole + rest)
