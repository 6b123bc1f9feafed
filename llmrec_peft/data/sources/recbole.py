"""RecBole atomic files: `.inter` and, beside it, `.item` and `.user`, tab-separated with `name:type` headers.

Source of the layout: recbole.io, "Atomic Files".
"""

from pathlib import Path

import pyarrow as pa

from llmrec_peft.data.sources.registry import RawLog, log_name, register
from llmrec_peft.data.sources.tabular import attach_users, check_utf8, complete_items, read_csv
from llmrec_peft.data.tables import ID_TYPE, listed
from llmrec_peft.errors import DataError

TYPES = {"token": pa.string(), "token_seq": pa.string(), "float": pa.float64(), "float_seq": pa.string()}


def _inter_files(path: str) -> list[Path]:
    place = Path(path)
    if place.is_dir():
        return sorted(place.glob("*.inter"))
    return [place] if place.name.endswith(".inter") and place.is_file() else []


@register("recbole", "name.inter with name.item", lambda path: bool(_inter_files(path)))
def read_recbole(path: str) -> RawLog:
    """Read RecBole atomic files; the columns of `.user` join the interactions.

    The item's title is the column `title`, else the first whose name holds "title" or "name". Without `.item`, ids are
    titles. A log that has neither label, rating nor behaviour holds positives: it gets the behaviour "interaction".

    Raises:
        DataError: no or several `.inter` files, a header without types, or a damaged file.
    """
    files = _inter_files(path)
    if len(files) != 1:
        names = listed([file.name for file in files])
        raise DataError(f"{path} holds {len(files)} .inter files ({names}); name the one to read")
    interactions = _read_atomic(files[0])
    for needed in ("user_id", "item_id"):
        if needed not in interactions.column_names:
            raise DataError(f"{files[0]} lacks {needed}:token; it has {listed(interactions.column_names)}; rename it")
    if not {"label", "rating", "behaviour"} & set(interactions.column_names):
        constant = pa.repeat(pa.scalar("interaction"), interactions.num_rows)
        interactions = interactions.append_column("behaviour", constant)
    user_file, item_file = files[0].with_suffix(".user"), files[0].with_suffix(".item")
    if user_file.is_file():
        interactions = attach_users(interactions, _keyed(user_file, "user_id"))
    if item_file.is_file():
        items = _with_title(_keyed(item_file, "item_id"), item_file)
    else:
        items = pa.schema([("item_id", ID_TYPE), ("title", ID_TYPE)]).empty_table()
    name = log_name(path)
    return RawLog(interactions, complete_items(items, interactions, name), name)


def _read_atomic(path: Path) -> pa.Table:
    with open(path, "rb") as file:
        header = file.readline()
    try:
        fields = [field.strip() for field in header.decode("utf-8-sig").rstrip("\r\n").split("\t")]
    except UnicodeDecodeError:
        check_utf8(path)
        raise
    types = {}
    for field in fields:
        name, _, kind = field.rpartition(":")
        if not name or kind not in TYPES:
            raise DataError(
                f"{path} has the header field {field!r}; RecBole needs name:type with {listed(list(TYPES))}"
            )
        types[name] = TYPES[kind]
    return read_csv(path, delimiter="\t", quoted=False, names=list(types), types=types, skip_rows=1)


def _keyed(path: Path, key: str) -> pa.Table:
    table = _read_atomic(path)
    if key not in table.column_names:
        raise DataError(f"{path} lacks {key}:token; it has {listed(table.column_names)}; rename the column")
    return table


def _with_title(items: pa.Table, path: Path) -> pa.Table:
    names = items.column_names
    if "title" in names:
        return items
    found = [name for name in names if "title" in name] or [name for name in names if "name" in name]
    if not found:
        raise DataError(f"{path} has no title column among {listed(names)}; name the item's text title:token_seq")
    return items.rename_columns(["title" if name == found[0] else name for name in names])
