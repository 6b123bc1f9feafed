"""The Arrow item table of a scorer, a bank or a recommender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers.directory import find_shards
from llmrec_peft.data.readers.tabular import read_tables, suffix_of
from llmrec_peft.data.rendering import python_values, render
from llmrec_peft.data.tables import prepare_items
from llmrec_peft.data.templates import template_columns
from llmrec_peft.requests.item_source import unknown_items

ItemsLike: TypeAlias = "str | Path | pa.Table | BehaviorLog | ItemTable | None"
"""What an item table can be read from; see `ItemTable.read`."""


class ItemTable:
    """Items by id: an `ItemSource` that renders many texts at once.

    Attributes:
        name: name of the table in messages.
        table: Arrow table [items] with `item_id`, `title` and other columns; None where no table was given.
    """

    takes_any_id = False

    def __init__(self, table: pa.Table | None, name: str = "items") -> None:
        self.name = name
        self.table = table
        self._ids: dict[str, int] | None = None

    @classmethod
    def read(cls, items: ItemsLike) -> ItemTable:
        """The item table of a log, an Arrow table, a file of items (parquet, csv, jsonl), or the directory of a log.

        Raises:
            DataError: nothing there can be read, or the table breaks a rule.
        """
        if isinstance(items, ItemTable):
            return items
        if items is None:
            return cls(None)
        if isinstance(items, BehaviorLog):
            return cls(items.items, items.name)
        if isinstance(items, pa.Table):
            return cls(prepare_items(items, "items"))
        path = Path(items)
        if path.is_file() and suffix_of(path) and not path.name.startswith("interactions"):
            return cls(prepare_items(read_tables([path]), path.name), path.name)
        shards = find_shards(path, "items")
        if shards:
            return cls(prepare_items(read_tables(shards), path.name), path.name)
        log = BehaviorLog.read(items, null_times="drop")  # of which only the items are used
        return cls(log.items, log.name)

    def __len__(self) -> int:
        return 0 if self.table is None else self.table.num_rows

    @property
    def column_names(self) -> list[str]:
        """Columns of the table."""
        return [] if self.table is None else self.table.column_names

    def row(self, item_id: str) -> int | None:
        """The row of an item, or None."""
        if self._ids is None:
            self._ids = {value: row for row, value in enumerate(self.ids())}
        return self._ids.get(item_id)

    def ids(self) -> list[str]:
        """Ids of all items, in the order of the table."""
        return [] if self.table is None else self.table.column("item_id").to_pylist()

    def rows(self, item_ids: Sequence[str], what: str) -> np.ndarray:
        """Rows of items, int64 [n].

        Raises:
            DataError: an id that the table lacks; `what` names its place in the request, for the message.
        """
        found = [self.row(item_id) for item_id in item_ids]
        if None in found:
            missing = [item_id for item_id, row in zip(item_ids, found, strict=True) if row is None]
            known = f"among the {len(self):,} items of {self.name}" if len(self) else "since no item table was given"
            raise unknown_items(missing, what, known)
        return np.array(found, np.int64)

    def take(self, column: str, rows: np.ndarray) -> pa.Array:
        """Values of a column [len(rows)]."""
        assert self.table is not None, "rows are of a table"
        return self.table.column(column).take(pa.array(rows)).combine_chunks()

    def check(self, ids: Sequence[str], what: str) -> None:
        """Raise DataError for an id that the table lacks."""
        self.rows(ids, what)

    def texts(self, ids: Sequence[str], template: str, forbidden: list[str]) -> list[str]:
        """The template filled with each item's columns."""
        rows = self.rows(ids, "items")
        columns = {name: self.take(name, rows) for name in template_columns(template)}
        return render(template, columns, forbidden).to_pylist()

    def values(self, ids: Sequence[str], names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of items as Python values [ids], by name."""
        rows = self.rows(ids, "items")
        return {name: python_values(self.take(name, rows), name) for name in names}
