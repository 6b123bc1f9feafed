"""Amazon Reviews 2023: reviews as jsonl or as the published csv, and beside them `meta_<the same name>` with the items.

Source of the layout: Hou et al. 2024, "Bridging Language and Items for Retrieval and Recommendation" (2403.03952), and
amazon-reviews-2023.github.io.
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
from llmrec_peft.data.times import from_milliseconds
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
CSV_COLUMNS = ["user_id", "parent_asin", "timestamp", "rating"]
ITEM_TEXTS = {name: name for name in ("title", "main_category", "store", "categories", "features")}


def _is_csv(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith((".csv", ".csv.gz"))


def _review_files(path: str) -> list[Path]:
    place = Path(path)
    found = sorted(place.iterdir()) if place.is_dir() else [place]
    return [entry for entry in found if _holds_reviews(entry)]


def _holds_reviews(file: Path) -> bool:
    if is_json(file):
        return first_keys(file) >= REVIEW_KEYS
    return _is_csv(file) and set(first_line(file).replace('"', "").split(",")) >= REVIEW_KEYS


@register(
    "amazon_reviews_2023",
    "Name.jsonl[.gz] or Name.csv[.gz] with meta_Name.jsonl[.gz]",
    lambda path: bool(_review_files(path)),
)
def read_amazon(path: str) -> RawLog:
    """Read one category of Amazon Reviews 2023; an item is a `parent_asin`, a time is in seconds.

    Left out on purpose, since they would leak the label: the text, title and votes of a review, which come after its
    rating, and an item's average rating and count, which include later reviews. Items without metadata or title
    have their id as their title.

    Raises:
        DataError: no reviews, more than one file of them, times that are not in milliseconds, or a damaged file.
    """
    files = _review_files(path)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path} holds {len(files)} files of Amazon reviews ({names}); name the one to read")
    file = files[0]
    if _is_csv(file):
        types = {field.name: field.type for field in REVIEW_SCHEMA if field.name in CSV_COLUMNS}
        reviews = read_csv(file, types=types, columns=CSV_COLUMNS)
    else:
        reviews = collect(open_jsonl(file, REVIEW_SCHEMA), REVIEW_SCHEMA)
    if not reviews.num_rows:
        raise DataError(f"{file} holds no reviews; download it again")
    interactions = reviews.rename_columns(["item_id" if n == "parent_asin" else n for n in reviews.column_names])
    seconds = from_milliseconds(reviews.column("timestamp"), f"reviews of {file}")
    interactions = interactions.set_column(2, "timestamp", pa.chunked_array([pa.array(seconds, from_pandas=True)]))
    stem = re.sub(r"\.(?:jsonl?|csv)(\.gz)?$", "", file.name, flags=re.IGNORECASE)
    meta = find_meta(file, [stem, re.sub(r"\.(?:train|valid|test)$", "", stem)])
    items = read_items(meta, "parent_asin", ITEM_TEXTS)
    return RawLog(interactions, complete_items(items, interactions, log_name(path)), log_name(path))
