"""An item table in plain Python, without Arrow: a list or mapping of rows, or a file of csv, jsonl or parquet."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrec_peft.data.csv_rules import TEXTS, delimiter_of, typed_values
from llmrec_peft.data.templates import fill, template_columns
from llmrec_peft.data.titles import is_unseen, title_fault
from llmrec_peft.data.values import replace_surrogates
from llmrec_peft.documents import parse_json
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, quoted
from llmrec_peft.requests.item_source import unknown_items
from llmrec_peft.requests.request_rules import item_id

MAX_FIELD = 64 << 20
"""Bytes of one field of csv, at most: what the package's own reader takes."""
SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")


class PlainItems:
    """Rows by item id: an `ItemSource`.

    Attributes:
        name: what messages call the table.
        column_names: columns of all rows, in order of appearance.
    """

    takes_any_id = False

    def __init__(self, rows: Iterable[Mapping[str, Any]], name: str = "items") -> None:
        """Raises DataError for a row without an item_id, for two of one id, and for a title that nobody can read."""
        self.name = name
        self._rows: dict[str, Mapping[str, Any]] = {}
        names: dict[str, None] = {}
        for place, row in enumerate(rows):
            if not isinstance(row, Mapping) or row.get("item_id") in (None, ""):
                raise DataError(f"items of {name}: row {place} must be a mapping with an item_id, not {quoted(row)}")
            item = _as_id(row["item_id"], f"items of {name}: row {place}")
            fault = title_fault(row["title"]) if "title" in row else None
            if fault:
                raise DataError(f"items of {name}: item {quoted(item)} {fault}; give each item a text, or drop it")
            if item in self._rows:
                raise DataError(f"items of {name} have the id {item!r} in more than one row; keep one row an item")
            self._rows[item] = {**row, "item_id": item}
            names.update(dict.fromkeys(row))
        self.column_names = list(names)
        untitled = [item for item, row in self._rows.items() if "title" not in row] if "title" in names else []
        if untitled:
            raise DataError(
                f"items of {name}: {len(untitled)} items have no title where others have one (first: "
                f"{quoted(untitled[0])}); give each item a text, or drop it"
            )

    @classmethod
    def read(cls, items: Any) -> PlainItems | None:
        """A table from rows (a list, or a mapping from ids), or from a file of csv, jsonl or parquet.

        A directory stands for the `items` file in it. In csv and jsonl, columns are typed as the package's own reader
        does: numbers where all values are numbers, but ids and titles stay text. Parquet needs pyarrow.

        Raises:
            DataError: nothing there can be read, or the table breaks a rule.
        """
        if items is None or isinstance(items, PlainItems):
            return items
        if isinstance(items, Mapping):
            return cls({"item_id": key, **row} if isinstance(row, Mapping) else row for key, row in items.items())
        if not isinstance(items, str | Path):
            if not isinstance(items, Sequence):
                raise DataError(f"items must be a list of mappings or a path, not {quoted(items)}; correct it")
            return cls(items)
        path = _file(Path(items))
        return cls(_read(path), path.name)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item_id: str) -> Mapping[str, Any]:
        return self._rows[item_id]

    def check(self, ids: Sequence[str], what: str) -> None:
        """Raise DataError for an id that the table lacks; `what` names its place in the request, for the message."""
        missing = [item for item in ids if item not in self._rows]
        if missing:
            raise unknown_items(missing, what, f"among the {len(self):,} items of {self.name}")

    def texts(self, ids: Sequence[str], template: str, forbidden: list[str]) -> list[str]:
        """The template filled with each item's columns."""
        names = template_columns(template)
        rows = (self._rows[item] for item in ids)
        return [fill(template, {name: row.get(name) for name in names}, forbidden) for row in rows]

    def values(self, ids: Sequence[str], names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of items as Python values [ids], by name."""
        return {name: [self._rows[item].get(name) for item in ids] for name in names}


def _as_id(value: Any, what: str) -> str:
    """An id as text; whole numbers in a float column lose their ".0"."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    item = item_id(int(value) if whole else value, what)
    if is_unseen(item):
        raise DataError(f"{what} has the item id {item!r}, which cannot be seen; give each item an id")
    return item


def _file(path: Path) -> Path:
    if path.is_dir():
        found = [path / f"items{suffix}" for suffix in SUFFIXES if (path / f"items{suffix}").is_file()]
        if not found:
            raise DataError(f"{path} has no items file ({listed(list(SUFFIXES))}); name the file")
        return found[0]
    if not path.is_file():
        raise DataError(f"{path} does not exist; give an item table of {listed(list(SUFFIXES))}")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path} is not one of {listed(list(SUFFIXES))}; give an item table in one of these forms")
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            return _parquet(path)
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if name.endswith(".gz")
            else path.open(encoding="utf-8-sig", newline="") as file
        ):
            return _csv(file, path) if ".csv" in name else _typed_json(_json_lines(file, path))
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable item table: {error!s:.120}; correct or write it again") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs the package pyarrow to be read; install it, or write csv or jsonl") from None
    return pyarrow.parquet.read_table(path).to_pylist()


def _csv(file: Any, path: Path) -> list[dict[str, Any]]:
    """Rows of a csv file, its columns typed by the rule that the package's own reader has."""
    header = file.readline()
    file.seek(0)
    with _long_fields():
        records = [record for record in csv.reader(file, delimiter=delimiter_of(header)) if record]
    names = records[0] if records else []
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has column {listed(repeated)} more than once; rename or drop the repeats")
    for number, record in enumerate(records, start=1):
        if len(record) != len(names):
            raise DataError(
                f"record {number} of {path} has {len(record)} fields, and its header {len(names)}; quote commas in a "
                "text, or complete the row"
            )
    columns = [list(column) for column in zip(*records[1:], strict=True)]
    typed = [
        column if name in TEXTS else typed_values(column) for name, column in zip(names, columns, strict=bool(columns))
    ]
    return [dict(zip(names, row, strict=True)) for row in zip(*typed, strict=True)]


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let csv read fields as long as training reads them."""
    before = csv.field_size_limit(MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_lines(file: Any, path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            row = parse_json(line, f"line {number} of {path}", advice="write one JSON object a line")
            if isinstance(row, dict) and isinstance(row.get("item_id"), str):
                item_id(row["item_id"], f"line {number} of {path}")
            yield _without_halves(row)


def _without_halves(value: Any) -> Any:
    """The value with U+FFFD for each half of a surrogate pair in its texts, as the package's own reader has it."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [_without_halves(part) for part in value]
    if isinstance(value, dict):
        return {replace_surrogates(name): _without_halves(part) for name, part in value.items()}
    return value


def _typed_json(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows in which a column with a number that is not whole has no whole ones."""
    found = list(rows)
    columns = {name for row in found if isinstance(row, dict) for name, value in row.items() if type(value) is float}
    for row in found:
        for name in columns & row.keys() if isinstance(row, dict) else ():
            if type(row[name]) is int:
                row[name] = float(row[name])
    return found
