"""Writers of one small log in each form that a reader takes; a value that a form cannot hold is written as text."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]
RATED = {"column": "rating", "above": 3}
PLAIN: dict[str, Any] = {"column": "label"}
FORMS: dict[str, tuple[Callable[[Path, Rows, Rows], None], dict[str, Any]]] = {}
"""From a form's name to what writes it, and to the domain's label rule for it."""


def form(name: str, label: dict[str, Any] = RATED) -> Callable[..., Any]:
    """Register a writer."""

    def register(write: Callable[[Path, Rows, Rows], None]) -> Callable[[Path, Rows, Rows], None]:
        FORMS[name] = (write, label)
        return write

    return register


@form("parquet")
def _parquet(place: Path, rows: Rows, items: Rows) -> None:
    for name, table in (("interactions", rows), ("items", items)):
        pq.write_table(_arrow(table), place / f"{name}.parquet")


@form("jsonl", PLAIN)
def _jsonl(place: Path, rows: Rows, items: Rows) -> None:
    for name, table in (("interactions", rows), ("items", items)):
        _json_lines(place / f"{name}.jsonl", table)


@form("csv", {"column": "behaviour", "map": {"click": "click", "skip": "skip"}})
def _csv(place: Path, rows: Rows, items: Rows) -> None:
    for name, table in (("interactions", rows), ("items", items)):
        _quoted(place / f"{name}.csv", [list(table[0]), *(list(row.values()) for row in table)])


@form("recbole")
def _recbole(place: Path, rows: Rows, items: Rows) -> None:
    for suffix, table in (("inter", rows), ("item", items)):
        header = [f"{name}:{'float' if name in ('timestamp', 'rating') else 'token'}" for name in table[0]]
        _tabs(place / f"small.{suffix}", [header, *(list(row.values()) for row in table)])


@form("movielens")
def _movielens(place: Path, rows: Rows, items: Rows) -> None:
    ratings = [[row["user_id"], row["item_id"], row["rating"], row["timestamp"]] for row in rows]
    _quoted(place / "ratings.csv", [["userId", "movieId", "rating", "timestamp"], *ratings])
    movies = [[item["item_id"], item["title"], item["genres"]] for item in items]
    _quoted(place / "movies.csv", [["movieId", "title", "genres"], *movies])


@form("amazon 2023")
def _amazon(place: Path, rows: Rows, items: Rows) -> None:
    reviews = [
        {"user_id": row["user_id"], "parent_asin": row["item_id"], "rating": row["rating"],
         "timestamp": _times(row["timestamp"], 1000)}
        for row in rows
    ]  # fmt: skip
    _json_lines(place / "Toys.jsonl", reviews)
    meta = [{"parent_asin": item["item_id"], "title": item["title"], "price": item["genres"]} for item in items]
    _json_lines(place / "meta_Toys.jsonl", meta)


@form("amazon 2018")
def _amazon_older(place: Path, rows: Rows, items: Rows) -> None:
    reviews = [
        {"reviewerID": row["user_id"], "asin": row["item_id"], "overall": row["rating"],
         "unixReviewTime": row["timestamp"]}
        for row in rows
    ]  # fmt: skip
    _json_lines(place / "Toys.json", reviews)
    _json_lines(place / "meta_Toys.json", [{"asin": item["item_id"], "title": item["title"]} for item in items])


@form("taobao", {"column": "behaviour", "map": {"pv": "skip", "buy": "click"}})
def _taobao(place: Path, rows: Rows, _items: Rows) -> None:
    behaviours = {"click": "buy", "skip": "pv"}
    numbers = [
        [_digits(row["user_id"]), _digits(row["item_id"]), 7, behaviours.get(str(row["behaviour"]), row["behaviour"]),
         row["timestamp"]]
        for row in rows
    ]  # fmt: skip
    _quoted(place / "UserBehavior.csv", numbers)


@form("mind", {"column": "behaviour", "map": {"show": "skip", "click": "click"}})
def _mind(place: Path, rows: Rows, items: Rows) -> None:
    impressions = [
        [number, row["user_id"], _american(row["timestamp"]), row["item_id"], f"{row['item_id']}-{row['label']}"]
        for number, row in enumerate(rows)
    ]
    _tabs(place / "behaviors.tsv", impressions)
    _tabs(place / "news.tsv", [[i["item_id"], "news", "x", i["title"], "", "", "[]", "[]"] for i in items])


@form("pointwise", PLAIN)
def _pointwise(place: Path, rows: Rows, _items: Rows) -> None:
    _json_lines(place / "records.jsonl", [{"input": row["item_id"], "label": row["label"]} for row in rows])


@form("instruction", {"column": "label", "map": {"click": "click", "skip": "skip"}})
def _instruction(place: Path, rows: Rows, _items: Rows) -> None:
    records = [{"instruction": "Bought?", "input": row["item_id"], "output": row["behaviour"]} for row in rows]
    (place / "records.json").write_text(json.dumps(records), "utf-8")


def _times(value: Any, factor: int) -> Any:
    return value * factor if isinstance(value, int) else value


def _digits(value: Any) -> Any:
    return value[1:] if isinstance(value, str) and value[1:].isdigit() else value


def _american(value: Any) -> Any:
    if not isinstance(value, int) or not 0 <= value < 2**33:
        return value
    moment = datetime.datetime.fromtimestamp(value, datetime.UTC)
    return f"{moment.month}/{moment.day}/{moment.year} {moment:%I:%M:%S %p}"


def _arrow(rows: Rows) -> pa.Table:
    columns = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
            columns[name] = pa.array([str(value).encode("utf-8", "replace").decode("utf-8") for value in values])
    return pa.table(columns)


def _json_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _quoted(path: Path, rows: list[list[Any]]) -> None:
    file = io.StringIO()
    csv.writer(file).writerows([["" if value is None else value for value in row] for row in rows])
    path.write_bytes(file.getvalue().encode("utf-8", "surrogatepass"))


def _tabs(path: Path, rows: list[list[Any]]) -> None:
    lines = ["\t".join("" if value is None else str(value) for value in row) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
