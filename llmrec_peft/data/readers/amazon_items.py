"""Items of Amazon's metadata files: texts as the shop shows them, and prices as numbers."""

import html
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from html.entities import html5
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmrec_peft.data.memory_mapped import collect
from llmrec_peft.data.readers.json_lines import warn_halves
from llmrec_peft.data.readers.json_records import is_json, read_records, record_batches
from llmrec_peft.data.values import replace_surrogates
from llmrec_peft.documents import has_surrogates
from llmrec_peft.errors import DataError
from llmrec_peft.messages import quoted

_log = logging.getLogger(__name__)

PRICE_CHARACTERS = 40
"""A price that is longer is no price: metadata of 2018 hold pieces of the page's code there."""

# Only with its semicolon is it an entity: `Black&Copper` holds none.
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:[ '’][0-9]{3})+(?![0-9])")
_PRICE = re.compile(r"(?:(?<![^\W\d_])[.,])?[0-9](?:[0-9.,]*[0-9])?")
_RANGE = re.compile(r"\W*(?:[A-Za-z]{1,4}\W*)?(?:[-–—~]|\bto\b)\W*(?:[A-Za-z]{1,4}\W*)?")


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
    return schema.empty_table() if path is None else collect(record_batches(_rows(path, key, texts), schema), schema)


def _rows(path: Path, key: str, texts: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of the item table; what was mended is logged after the last."""
    halves = 0
    prices: list[str] = []
    for number, record in enumerate(read_records(path), start=1):
        item = record.get(key)
        if item is not None and not isinstance(item, str):
            raise DataError(f"record {number} of {path} has {key} {item!r:.60}; it must be a text")
        if item is not None and has_surrogates(item):
            raise DataError(
                f"record {number} of {path} has {key} {item!r:.60} with half of a surrogate pair; correct it"
            )
        price = record.get("price")
        row: dict[str, Any] = {"item_id": item, "price": price_of(price)}
        if row["price"] is None and isinstance(price, str) and any(map(str.isdigit, price)):
            prices.append(price)
        for name, source in texts.items():
            row[name], mended = shown_text(record.get(source))
            halves += mended
        yield row
    warn_halves(halves, str(path))
    if prices:
        _log.warning("%s: %d prices are not one number or may be read in two ways (first: %s); they are empty", path,
                     len(prices), quoted(prices[0]))  # fmt: skip


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
    return (_ENTITY.sub(_entity, text) if "&" in text else text), mended


def _entity(found: re.Match[str]) -> str:
    """What an entity stands for; a name that is none stays, though its start may be one, as in `&notit;`."""
    text = found.group()
    return html.unescape(text) if text[1] == "#" or text[1:] in html5 else text


def price_of(value: Any) -> float | None:
    """A price as a number, the first of a range, or None where it is no price or may be read in two ways.

    With one sign before one or two digits it is decimal: `12,99 €` and `$.99`. Before groups of three digits, signs of
    one kind group thousands: `$1,299` is 1299, and so is the start of `$1,299.00 - $1,499.00`, whose last sign is
    another. A point before three digits may be either (`1.299 €`), and texts with other numbers have no single price.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) <= sys.float_info.max else None
    if not isinstance(value, str) or len(value) > PRICE_CHARACTERS or re.match(r"\s*-", value):
        return None
    text = re.sub(r"[\u00a0\u202f\u2009]", " ", value)
    text = _GROUPED.sub(lambda found: re.sub("[ '’]", "", found.group()), text)
    found = list(_PRICE.finditer(text))
    if len(found) == 2 and _RANGE.fullmatch(text, found[0].end(), found[1].start()):
        found = found[:1]
    digits_of_others = any(sign.isdigit() and not sign.isascii() for sign in text)
    return None if len(found) != 1 or digits_of_others else _number(found[0].group())


def _number(text: str) -> float | None:
    """A number in ASCII digits with points and commas, or None where their meaning is open."""
    feedback = re.findall("[.,]", text)
    if not feedback:
        return float(text)
    whole, last, rest = re.fullmatch(r"(.*)([.,])([0-9]*)", text).groups()  # type: ignore[union-attr]
    if len(feedback) == 1:
        if len(rest) == 3 and whole not in ("", "0") and len(whole) <= 3:
            return float(whole + rest) if last == "," else None
        return float(f"{whole or 0}.{rest}") if last == "." or len(rest) < 3 or whole in ("", "0") else None
    grouping, grouped = feedback[0], whole if last != feedback[0] else text
    if not re.fullmatch(rf"[0-9]{{1,3}}(?:{re.escape(grouping)}[0-9]{{2,3}})*{re.escape(grouping)}[0-9]{{3}}", grouped):
        return None
    return float(grouped.replace(grouping, "") + (f".{rest}" if grouped is whole else ""))
