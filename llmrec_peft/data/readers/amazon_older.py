"""Amazon reviews before 2023: the jsonl of 2014 and 2018 with `meta_<name>`, and the csv of ratings without a header.

Source of the layouts: McAuley et al. 2015, Ni et al. 2019, and nijianmo.github.io/amazon.
"""

import re
from pathlib import Path

import pyarrow as pa

from llmrec_peft.data.memory_mapped import collect
from llmrec_peft.data.readers.amazon_items import find_meta, read_items
from llmrec_peft.data.readers.csv_files import read_csv
from llmrec_peft.data.readers.json_lines import open_jsonl
from llmrec_peft.data.readers.json_records import first_keys, is_json
from llmrec_peft.data.readers.registry import RawLog, log_name, register
from llmrec_peft.data.readers.tabular import complete_items
from llmrec_peft.data.readers.text_bytes import first_line
from llmrec_peft.errors import DataError

REVIEW_KEYS = {"reviewerID", "asin", "overall", "unixReviewTime"}
REVIEW_SCHEMA = pa.schema(
    [("reviewerID", pa.string()), ("asin", pa.string()), ("overall", pa.float64()), ("unixReviewTime", pa.int64())]
)
COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
ITEM_TEXTS = {
    "title": "title",
    "main_category": "main_cat",
    "brand": "brand",
    "categories": "category",
    "features": "feature",
}
_ITEM, _USER = r"(?:B[0-9A-Z]{9}|[0-9]{9}[0-9X])", r"A[0-9A-Z]{9,20}"
_REST = r",[1-5](?:\.0)?,[0-9]{9,10}$"
_ROWS = {("user_id", "item_id"): f"^{_USER},{_ITEM}{_REST}", ("item_id", "user_id"): f"^{_ITEM},{_USER}{_REST}"}


def _order(file: Path) -> list[str] | None:
    """The columns of a csv of ratings, detected from its first row: 2014 has the user first, 2018 the item."""
    if not file.is_file() or not file.name.lower().endswith((".csv", ".csv.gz")):
        return None
    line = first_line(file)
    return next(([*ids, *COLUMNS[2:]] for ids, row in _ROWS.items() if re.match(row, line)), None)


def _files(path: str) -> list[Path]:
    place = Path(path)
    found = sorted(place.iterdir()) if place.is_dir() else [place]
    return [file for file in found if (is_json(file) and first_keys(file) >= REVIEW_KEYS) or _order(file)]


@register(
    "amazon_reviews_2018",
    "Name.json[.gz] of reviews or Name.csv of ratings with meta_Name.json[.gz]",
    lambda path: bool(_files(path)),
)
def read_amazon_older(path: str) -> RawLog:
    """Read one category of Amazon reviews of 2014 or 2018; an item is an `asin`.

    The text and votes of a review are left out, as in `amazon_reviews_2023`. Items without metadata or title keep their
    id as their title. A csv of ratings has no header; its first row shows which column is the user.

    Raises:
        DataError: no reviews, more than one file of them, or a damaged file.
    """
    files = _files(path)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path} holds {len(files)} files of Amazon reviews ({names}); name the one to read")
    file = files[0]
    order = _order(file)
    if order:
        types = {"user_id": pa.string(), "item_id": pa.string(), "rating": pa.float64(), "timestamp": pa.int64()}
        interactions = read_csv(file, types=types, names=order, quoted=False)
    else:
        interactions = collect(open_jsonl(file, REVIEW_SCHEMA), REVIEW_SCHEMA).rename_columns(COLUMNS)
    stem = re.sub(r"\.(?:jsonl?|csv)(\.gz)?$", "", file.name, flags=re.IGNORECASE)
    bare = re.sub(r"^(?:reviews|ratings)_|(?:_\d+)$", "", re.sub(r"_\d+$", "", stem))
    meta = find_meta(file, [stem, bare])
    items = read_items(meta, "asin", ITEM_TEXTS)
    return RawLog(interactions, complete_items(items, interactions, log_name(path)), log_name(path))
