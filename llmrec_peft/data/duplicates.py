"""Rows of one user, item and moment: find them, and choose the one of each group that stays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RULES = ("keep", "drop")
"""Values of a domain's `duplicates`."""


@dataclass(frozen=True)
class Duplicates:
    """Rows that share user, item and moment with another row.

    Attributes:
        rows: int64 [n], row numbers of the log, ordered by group, then by row.
        groups: int64 [n], the group of each, numbered from 0, non-decreasing.
    """

    rows: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, users: np.ndarray, items: np.ndarray, times: np.ndarray) -> Duplicates:
        """Find the duplicates of a log.

        Args:
            users, items: int [rows of the log], codes.
            times: [rows of the log]. Rows are sorted by user, then by time.
        """
        # Rows of one moment are neighbours, so only the rows of moments with several rows are sorted.
        new = np.ones(len(users), bool)
        new[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
        alone = new & np.append(new[1:], True)
        rows = np.flatnonzero(~alone)
        # One number for (moment, item): moments are numbered by the cumulative sum.
        keys = np.cumsum(new)[rows] * (np.int64(items.max(initial=0)) + 1) + items[rows]
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        start = np.diff(keys, prepend=-1) != 0
        repeated = ~start | ~np.append(start[1:], True)[: len(rows)]
        return cls(rows[repeated], np.cumsum(start[repeated]) - 1)

    def surplus(self, classes: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Rows to drop so that one of each group stays; int64, sorted.

        The row that stays has a label if any row of the group has one, then is a target rather than `context_only`,
        then is the last in the order of the file.

        Args:
            classes: int [rows of the log], -1 without a label.
            hidden: bool [rows of the log], whether `context_only`.
        """
        order = np.lexsort((self.rows, ~hidden[self.rows], classes[self.rows] >= 0, self.groups))
        groups = self.groups[order]
        return np.sort(self.rows[order[np.flatnonzero(groups[1:] == groups[:-1])]])

    def conflicts(self, classes: np.ndarray) -> int:
        """Number of groups whose rows have different labels."""
        labelled = classes[self.rows] >= 0
        groups, found = self.groups[labelled], classes[self.rows[labelled]]
        differ = (groups[1:] == groups[:-1]) & (found[1:] != found[:-1])
        return len(np.unique(groups[1:][differ]))
