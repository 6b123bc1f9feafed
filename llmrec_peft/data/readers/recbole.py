"""RecBole atomic files: `.inter` and, beside it, `.item` and `.user`, tab-separated with `name:type` headers.

Source of the layout: recbole.io, "Atomic Files"; of the published names: RecSysDatasets, "conversion_tools".
"""

import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.csv_rules import DELIMITERS
from llmrec_peft.data.readers.csv_files import read_csv
from llmrec_peft.data.readers.mending import meeting_ids
from llmrec_peft.data.readers.registry import RawLog, log_name, register
from llmrec_peft.data.readers.tabular import attach_users, complete_items
from llmrec_peft.data.readers.text_bytes import check_utf8
from llmrec_peft.data.tables import ID_TYPE, is_blank, is_text
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, quoted

_log = logging.getLogger(__name__)

TYPES = {"token": pa.string(), "token_seq": pa.string(), "float": pa.float64(), "float_seq": pa.string()}
THINGS = (
    ("item", "product", "movie", "film", "anime", "book", "song", "track", "artist", "album", "music", "video", "venue")
    + ("poi", "business", "merchant", "restaurant", "place", "news", "article", "app", "game", "recipe", "goods", "sku")
    + ("course", "event", "paper", "joke", "ad")
)
"""What published files call an item: `<thing>_id` is its id, `<thing>_name` or `<thing>_title` its title."""
OTHER_NAMES = {
    "user_id": ("visitor_id", "customer_id", "session_id"),
    "item_id": tuple(f"{thing}_id" for thing in THINGS[1:]),
    "timestamp": ("date", "datetime", "time"),
    "rating": ("stars",),
}
_OF_OTHERS = re.compile(
    "(?:^|_)(?:cate|class|brand|genre|author|writer|publisher|developer|director|actor|seller|store|shop|owner|user"
    "|tag|city|country|state|street|address|type|group|department|file|nick)"
)
"""Names that are of something else than the item: many items share one."""


def _inter_files(path: str) -> list[Path]:
    place = Path(path)
    if place.is_dir():
        return sorted(file for file in place.glob("*.inter") if file.is_file())
    return [place] if place.name.endswith(".inter") and place.is_file() else []


@register("recbole", "name.inter with name.item", lambda path: bool(_inter_files(path)))
def read_recbole(path: str) -> RawLog:
    """Read RecBole atomic files; the columns of `.user` join the interactions.

    The item's title is the column `title` of `.item`, else the text column that is called `name`, or whose name ends
    with `_title` or `_name` and is the item's own, else that of `.inter`; without any, ids are titles. `venue_id`,
    `artist_id` and the like stand for `item_id` where that is missing. A log that has neither label, rating nor
    behaviour holds positives: it gets the behaviour "interaction". What is read otherwise than declared is logged as a
    warning.

    Raises:
        DataError: no or several `.inter` files, a header without types, several columns that may be the title, or a
            damaged file.
    """
    files = _inter_files(path)
    if len(files) != 1:
        names = listed([file.name for file in files])
        raise DataError(f"{path} holds {len(files)} .inter files ({names}); name the one to read")
    interactions, renamed = _named(_read_atomic(files[0]), files[0], OTHER_NAMES)
    for needed in ("user_id", "item_id"):
        if needed not in interactions.column_names:
            raise DataError(f"{files[0]} lacks {needed}:token; it has {listed(interactions.column_names)}; rename it")
    if "timestamp" not in interactions.column_names:
        raise DataError(
            f"{files[0]} has no timestamp:float; it has {listed(interactions.column_names)}; a user's history needs an "
            "order: add the column from the source that the file was made of"
        )
    if not {"label", "rating", "behaviour"} & set(interactions.column_names):
        constant = pa.repeat(pa.scalar("interaction"), interactions.num_rows)
        interactions = interactions.append_column("behaviour", constant)
    user_file, item_file = files[0].with_suffix(".user"), files[0].with_suffix(".item")
    if user_file.is_file():
        interactions = attach_users(interactions, _keyed(user_file, "user_id", renamed), user_file)
    name = log_name(path)
    items = _keyed(item_file, "item_id", renamed) if item_file.is_file() else None
    if items is not None:
        interactions, items = meeting_ids(interactions, items, "item_id", f"interactions of {path}", str(item_file))
    items = _items(interactions, items, item_file)
    return RawLog(interactions, complete_items(items, interactions, name), name)


def _read_atomic(path: Path) -> pa.Table:
    with path.open("rb") as file:
        content = file.readline(1 << 20)
    try:
        header = content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        check_utf8(path)
        raise
    delimiter, types = _header(header, path)
    floats = [name for name, kind in types.items() if kind == pa.float64()]
    quoted = delimiter != "\t"
    return read_csv(path, delimiter=delimiter, quoted=quoted, names=list(types), types=types, skip_rows=1, loose=floats)


def _header(header: str, path: Path) -> tuple[str, dict[str, pa.DataType]]:
    """The separator of an atomic file and the types of its columns."""
    for delimiter in ("\t", *(sign for sign in DELIMITERS if sign != "\t")):
        fields = [field.strip().strip('"') for field in header.split(delimiter)]
        parts = [field.rpartition(":") for field in fields]
        if all(name and kind in TYPES and not re.search("[,;\t|:]", name) for name, _, kind in parts):
            if delimiter != "\t":
                _log.warning("%s: fields are separated by %r where RecBole has a tab; read so", path, delimiter)
            return delimiter, {name: TYPES[kind] for name, _, kind in parts}
    fields = [field.strip() for field in header.split("\t")]
    wrong = next((field for field in fields if field.rpartition(":")[2] not in TYPES or ":" not in field), header)
    raise DataError(
        f"{path} has the header field {quoted(wrong)}; RecBole needs name:type with {listed(list(TYPES))}, "
        "separated by tabs"
    )


def _named(table: pa.Table, path: Path, others: dict[str, tuple[str, ...]]) -> tuple[pa.Table, dict[str, str]]:
    """The table with published names of ids and times as ours, and which were renamed."""
    renamed = {}
    for needed, candidates in others.items():
        if needed in table.column_names:
            continue
        found = [name for name in candidates if name in table.column_names]
        if len(found) > 1 and needed.endswith("_id"):
            raise DataError(f"{path} lacks {needed} and has {listed(found)}; rename the one that is meant to {needed}")
        if found:
            _log.warning("%s: the column %s is read as %s", path, found[0], needed)
            renamed[found[0]] = needed
    return table.rename_columns([renamed.get(name, name) for name in table.column_names]), renamed


def _keyed(path: Path, key: str, renamed: dict[str, str]) -> pa.Table:
    """The table of `.item` or `.user`, whose key may have the name that `.inter` gives it, or `id`."""
    table = _read_atomic(path)
    same = tuple(name for name, meant in renamed.items() if meant == key)
    for names in (same, ("id",), OTHER_NAMES[key]):
        table, _ = _named(table, path, {key: names})
    if key not in table.column_names:
        raise DataError(f"{path} lacks {key}:token; it has {listed(table.column_names)}; rename the column")
    return table


def _items(interactions: pa.Table, items: pa.Table | None, path: Path) -> pa.Table:
    """The item table with titles from `.item`, else from `.inter`, else none."""
    if items is not None and "title" in set(items.column_names) - set(_texts(items)):
        raise DataError(f"{path} has title:float; titles are texts: write title:token in its header")
    title = None if items is None else _title_column(_texts(items), path)
    if items is not None and title is not None:
        return items.rename_columns(["title" if name == title else name for name in items.column_names])
    named = _title_column([name for name in _texts(interactions) if _of_item(name)], path.with_suffix(".inter"))
    if named is not None:
        titles = _first_titles(interactions, named)
        if items is None:
            return titles
        rows = pc.index_in(items.column("item_id"), value_set=titles.column("item_id").combine_chunks())
        return items.append_column("title", titles.column("title").take(rows))
    if items is None:
        return pa.schema([("item_id", ID_TYPE), ("title", ID_TYPE)]).empty_table()
    others = [name for name in items.column_names if name != "item_id"]
    _log.warning("%s: no column holds titles; name %s in the domain's template instead", path, listed(others))
    return items.append_column("title", pa.nulls(items.num_rows, pa.string()))


def _first_titles(interactions: pa.Table, column: str) -> pa.Table:
    """Each item's first title that is not blank."""
    named = pa.table(
        {"item_id": interactions.column("item_id"), "title": interactions.column(column).cast(pa.string())}
    )
    named = named.filter(pc.invert(is_blank(named.column("title"))))
    ids = named.column("item_id").combine_chunks()
    return named.take(pc.index_in(pc.unique(ids), value_set=ids))


def _title_column(names: list[str], path: Path) -> str | None:
    """The column that holds the items' titles, or None.

    Raises:
        DataError: several may be meant.
    """
    if "title" in names:
        return "title"
    own = [name for name in names if not _OF_OTHERS.search(_words(name))]
    for word in ("title", "name"):
        found = [name for name in own if re.search(f"(?:^|_){word}$", _words(name))]
        found = [name for name in found if _of_item(name) or name == word] or found
        if len(found) > 1:
            raise DataError(f"{path} has no title but {listed(found)}; rename the one that is the item's to title")
        if found:
            if not _of_item(found[0]) and found[0] != word:
                _log.warning("%s: no column is called title; %s is taken for it by its name", path, found[0])
            return found[0]
    return None


def _texts(table: pa.Table) -> list[str]:
    """Columns that may hold titles: those of texts."""
    return [field.name for field in table.schema if is_text(field.type)]


def _words(name: str) -> str:
    """A column's name in lower case, its words joined by underscores: `productName` too."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _of_item(name: str) -> bool:
    """Whether a column's name says that it is an item's title or name."""
    return name == "title" or name in {f"{thing}_{word}" for thing in THINGS for word in ("title", "name")}
