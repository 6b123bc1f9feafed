"""The item table that a scorer looks items up in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers.directory import find_parts
from llmrec_peft.data.readers.tabular import read_tables, suffix_of
from llmrec_peft.data.tables import prepare_items
from llmrec_peft.errors import DataError
from llmrec_peft.messages import quoted


class Catalogue:
    """Items by id.

    Attributes:
        name: what messages call the table.
        table: Arrow table [items] with `item_id`, `title` and other columns; None where no table was given.
    """

    def __init__(self, table: pa.Table | None, name: str = "items") -> None:
        self.name = name
        self.table = table
        self._ids: dict[str, int] | None = None

    @classmethod
    def read(cls, items: str | Path | pa.Table | BehaviorLog | Catalogue | None) -> Catalogue:
        """The item table of a log, an Arrow table, a file of items (parquet, csv, jsonl), or the directory of a log.

        Raises:
            DataError: nothing there can be read, or the table breaks a rule.
        """
        if isinstance(items, Catalogue):
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
        parts = find_parts(path, "items")
        if parts:
            return cls(prepare_items(read_tables(parts), path.name), path.name)
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
            ids = [] if self.table is None else self.table.column("item_id").to_pylist()
            self._ids = {value: row for row, value in enumerate(ids)}
        return self._ids.get(item_id)

    def rows(self, item_ids: Sequence[str], what: str) -> np.ndarray:
        """Rows of items, int64 [n].

        Raises:
            DataError: an id that the table lacks; `what` says where it stood.
        """
        found = [self.row(item_id) for item_id in item_ids]
        if None in found:
            missing = [item_id for item_id, row in zip(item_ids, found, strict=True) if row is None]
            known = f"among the {len(self):,} items of {self.name}" if len(self) else "since no item table was given"
            raise DataError(
                f"{what}: item {quoted(missing[0])} is unknown {known} ({len(missing)} such); add it to the table, or "
                "give its columns as a mapping"
            )
        return np.array(found, np.int64)

    def take(self, column: str, rows: np.ndarray) -> pa.Array:
        """Values of a column [len(rows)]."""
        taken = self.table.column(column).take(pa.array(rows))
        return taken.combine_chunks()
