"""Rows that repeat a user, an item and a moment: which they are, and which one of each stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmrec_peft.data.log import BehaviorLog

RULES = ("keep", "drop")
"""What a domain can do with duplicates."""


@dataclass(frozen=True)
class Duplicates:
    """Rows that share user, item and moment with another row.

    rows: int64 [n], row numbers by group, rising within one. groups: int64 [n], the group of each, from 0, rising.
    """

    rows: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, log: BehaviorLog) -> Duplicates:
        """Find them in one pass; only the rows of moments with several rows are sorted."""
        # The log's rows go by user, then time, so that the rows of a moment are neighbours.
        users, times = log.user_codes, log.timestamps
        new = np.ones(len(users), bool)
        new[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
        alone = new & np.append(new[1:], True)
        rows = np.flatnonzero(~alone)
        keys = np.cumsum(new)[rows] * np.int64(log.num_items) + log.item_codes[rows]
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        start = np.diff(keys, prepend=-1) != 0
        repeated = ~start | ~np.append(start[1:], True)[: len(rows)]
        return cls(rows[repeated], np.cumsum(start[repeated]) - 1)

    def surplus(self, classes: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Rows to drop so that one of each group stays, sorted int64.

        A row with a label stays before one without, then a target before a `context_only` row, then the last row in the
        order of the file, as the newest word on the event.

        classes: int [rows of the log], -1 without a label. hidden: bool [rows of the log], whether `context_only`.
        """
        order = np.lexsort((self.rows, ~hidden[self.rows], classes[self.rows] >= 0, self.groups))
        groups = self.groups[order]
        return np.sort(self.rows[order[np.flatnonzero(groups[1:] == groups[:-1])]])

    def conflicts(self, classes: np.ndarray) -> int:
        """How many groups have rows of different labels."""
        labelled = classes[self.rows] >= 0
        groups, found = self.groups[labelled], classes[self.rows[labelled]]
        differ = (groups[1:] == groups[:-1]) & (found[1:] != found[:-1])
        return len(np.unique(groups[1:][differ]))
