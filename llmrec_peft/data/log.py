"""BehaviorLog: interactions of users with items, checked, sorted by user and time and kept in Arrow; and its splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.duplicates import Duplicates
from llmrec_peft.data.memory_mapped import BATCH_ROWS, MAPPED_ROWS, map_batches
from llmrec_peft.data.readers import read_raw_log
from llmrec_peft.data.splits import NAMES, split_rows
from llmrec_peft.data.tables import bool_numpy, check_columns, numbered, offenders, prepare_interactions, prepare_items
from llmrec_peft.data.times import are_dated
from llmrec_peft.errors import DataError, input_errors
from llmrec_peft.messages import listed, quoted, shortened


class BehaviorLog:
    """Interactions of users with items, in the order that the streams need.

    Rows are sorted by user, then by time; rows of one moment keep their order. Users are in the order of their sorted
    ids. Users and items have integer codes, so that later steps work on arrays; text stays in the item table.

    Attributes:
        name: name of the log in messages.
        interactions: Arrow table [rows] with `user_id`, `item_id`, `timestamp` (seconds), at least one of `label`,
            `rating` and `behaviour`, and the log's own columns. Logs above a million rows are memory-mapped.
        items: Arrow table [items] with `item_id`, `title` and other columns, in the given order.
        user_ids: Arrow strings [users], sorted.
        user_codes: int32 [rows], position in `user_ids`, non-decreasing.
        user_offsets: int64 [users + 1]; the rows of user u are `user_offsets[u]:user_offsets[u + 1]`.
        item_codes: int32 [rows], row in `items`.
        timestamps: int64 or float64 [rows], seconds since 1970 if the log is `dated`; otherwise numbers that only
            define an order.
    """

    def __init__(self, interactions: pa.Table, items: pa.Table | None = None, *, name: str = "log") -> None:
        """Check and sort a log.

        Args:
            interactions: `user_id`, `item_id`, `timestamp` (seconds, datetimes or row numbers) and at least one of
                `label`, `rating` and `behaviour`. A boolean column `context_only` marks rows that are history and never
                targets.
            items: `item_id`, `title` and any other columns. Without this table the interactions need a `title` column,
                and each item takes the title of its first row.
            name: name of the log in messages.

        Raises:
            DataError: a rule is broken; the message names the rule, the rows or ids and what to do.
        """
        self.name = name
        interactions, seconds = prepare_interactions(interactions, name)
        self.items = prepare_items(_items_of(interactions, name) if items is None else items, name)
        item_codes = self._code_items(interactions.column("item_id"))
        users = interactions.column("user_id")
        distinct = pc.unique(users)
        self.user_ids: pa.Array = distinct.take(pc.sort_indices(distinct))
        user_codes = _codes(users, self.user_ids)

        order = _order(user_codes, seconds)
        self.interactions = _arranged(interactions, order)
        self.user_codes = user_codes if order is None else user_codes[order]
        self.item_codes = item_codes if order is None else item_codes[order]
        self.timestamps = seconds if order is None else seconds[order]
        counts = np.bincount(self.user_codes, minlength=len(self.user_ids))
        self.user_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if len(self) > MAPPED_ROWS:
            pa.default_memory_pool().release_unused()  # memory of the sort; the table itself is memory-mapped
        self._item_rows: dict[str, int] | None = None

    @classmethod
    def read(cls, path: str | Path, *, format: str = "auto", null_times: str = "refuse") -> BehaviorLog:
        """Read a log from a directory, a file or a Hub data set.

        Args:
            path: directory, file or Hub data set (`hf://owner/name`).
            format: a name from `llmrec_peft.data.readers.READERS`, or "auto" to detect it from the files.
            null_times: "drop" leaves out interactions without a timestamp, with a warning that counts them; "refuse"
                raises an error.

        Raises:
            DataError: the log cannot be read, or it breaks a rule.
        """
        with input_errors(DataError, f"log {shortened(path)}", "correct its files or name others"):
            raw = read_raw_log(path, format=format, null_times=null_times)
            return cls(raw.interactions, raw.items, name=raw.name)

    def __len__(self) -> int:
        return len(self.user_codes)

    def __repr__(self) -> str:
        return (
            f"BehaviorLog({self.name!r}: {len(self):,} interactions of {self.num_users:,} users "
            f"with {self.num_items:,} items)"
        )

    @property
    def dated(self) -> bool:
        """Whether timestamps are seconds since 1970, from 1990 to 2100; False if they only define an order."""
        return are_dated(self.timestamps)

    @property
    def num_users(self) -> int:
        """Number of users; each has at least one row."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Rows of the item table, with or without interactions."""
        return self.items.num_rows

    @cached_property
    def duplicates(self) -> Duplicates:
        """Rows that share user, item and moment with another row."""
        return Duplicates.of(self.user_codes, self.item_codes, self.timestamps)

    @cached_property
    def context_only(self) -> np.ndarray:
        """bool [rows]: whether a row is history only and can never be a target."""
        if "context_only" not in self.interactions.column_names:
            return np.zeros(len(self), dtype=bool)
        return self.column("context_only").to_numpy()

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the interactions, [rows].

        Raises:
            DataError: there is no such column; the message names those that exist.
        """
        if name not in self.interactions.column_names:
            raise DataError(
                f"interactions of log {self.name!r} have no column {name!r}; "
                f"it has {listed(self.interactions.column_names)}; name one of these"
            )
        return self.interactions.column(name)

    def item_index(self, item_id: str) -> int:
        """The row of an item in `items`.

        Raises:
            DataError: no item has this id.
        """
        if self._item_rows is None:
            self._item_rows = {value: row for row, value in enumerate(self.items.column("item_id").to_pylist())}
        try:
            return self._item_rows[item_id]
        except KeyError:
            raise DataError(
                f"log {self.name!r} has no item with id {quoted(item_id)} among {self.num_items} items; "
                "use an id of the item table"
            ) from None

    def summary(self) -> dict[str, object]:
        """Counts of the log: users, items, interactions, first and last time in seconds, rows of each behaviour."""
        counts: dict[str, object] = {
            "users": self.num_users,
            "items": self.num_items,
            "interactions": len(self),
            "first_time": self.timestamps.min().item(),
            "last_time": self.timestamps.max().item(),
        }
        if "behaviour" in self.interactions.column_names:
            found = pc.value_counts(self.interactions.column("behaviour")).to_pylist()
            counts["behaviours"] = {str(entry["values"]): entry["counts"] for entry in found}
        return counts

    def split(self, by: str = "time", valid: float = 0.1, test: float = 0.1, seed: int = 0) -> Splits:
        """Split the log into train, valid and test targets, by one global time or by user.

        Args:
            by: `time` sets two boundaries for all users; `user` deals whole users at random.
            valid, test: fractions of the rows (by time) or of the users (by user).
            seed: random seed of the order of users.

        Raises:
            DataError: see `llmrec_peft.data.splits.split_rows`.
        """
        parts, boundaries = split_rows(
            self.user_codes,
            self.timestamps,
            self.context_only,
            by=by,
            valid=valid,
            test=test,
            seed=seed,
            name=self.name,
        )
        train, valid_, test_ = (LogSplit(name, self, rows) for name, rows in zip(NAMES, parts, strict=True))
        return Splits(train, valid_, test_, by, boundaries)

    def _code_items(self, ids: pa.ChunkedArray) -> np.ndarray:
        found = pc.index_in(ids, value_set=self.items.column("item_id"))
        if found.null_count:
            count, rows = offenders(bool_numpy(found.is_null()))
            first = listed([quoted(value) for value in ids.take(rows).to_pylist()])
            raise DataError(
                f"interactions of log {self.name!r} name items that the item table lacks in {count} rows "
                f"({numbered(rows, count)}: {first}); add these items or drop the rows"
            )
        return found.to_numpy().astype(np.int32, copy=False)


@dataclass(frozen=True)
class LogSplit:
    """The targets of one split: `rows` are sorted row numbers (int64) of `log`."""

    name: str
    log: BehaviorLog = field(repr=False)
    rows: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def users(self) -> np.ndarray:
        """Codes (int32, sorted, each once) of the users who have a target here."""
        # The log's rows go by user, so that a user's targets are neighbours.
        codes = self.log.user_codes[self.rows]
        return codes[np.diff(codes, prepend=-1) > 0]


@dataclass(frozen=True)
class Splits:
    """The three splits of one log. Iterating gives the names; `splits["valid"]` and `splits.items()` go by name.

    `boundaries` holds, for a split by time, the first moment of valid and that of test, in the log's seconds.
    """

    train: LogSplit
    valid: LogSplit
    test: LogSplit
    by: str
    boundaries: tuple[float, float] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)

    def __getitem__(self, name: str) -> LogSplit:
        if name not in NAMES:
            raise DataError(f"Splits: there is no split {name!r}; use one of {', '.join(NAMES)}")
        return getattr(self, name)

    def items(self) -> Iterator[tuple[str, LogSplit]]:
        """Yield (name, split), train first."""
        return ((name, self[name]) for name in NAMES)


def _items_of(interactions: pa.Table, name: str) -> pa.Table:
    """An item table from a `title` column of the interactions: the title of each item's first row."""
    where = f"interactions of log {name!r}, which come without an item table,"
    check_columns(interactions, ("title",), where)
    first = pc.index_in(pc.unique(interactions.column("item_id")), value_set=interactions.column("item_id"))
    return interactions.select(["item_id", "title"]).take(first)


def _codes(values: pa.ChunkedArray, names: pa.Array) -> np.ndarray:
    return pc.index_in(values, value_set=names).to_numpy().astype(np.int32, copy=False)


def _order(user_codes: np.ndarray, seconds: np.ndarray) -> np.ndarray | None:
    """The stable permutation that sorts rows by user and time, or None where they are sorted already."""
    step = np.diff(user_codes)
    if not np.any((step < 0) | ((step == 0) & (np.diff(seconds) < 0))):
        return None
    return np.lexsort((seconds, user_codes))


def _arranged(table: pa.Table, order: np.ndarray | None) -> pa.Table:
    """The table in the given order; above `MAPPED_ROWS` rows it is memory-mapped."""
    if table.num_rows <= MAPPED_ROWS:
        return (table if order is None else table.take(order)).combine_chunks()

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, table.num_rows, BATCH_ROWS):
            part = table.slice(start, BATCH_ROWS) if order is None else table.take(order[start : start + BATCH_ROWS])
            yield from part.combine_chunks().to_batches()

    return map_batches(batches(), table.schema)
