"""What users did before a moment, as arrays of item codes: all that a collaborative model is told of a user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import DataError


@dataclass(frozen=True)
class Histories:
    """Events of u users. Those of user n are `offsets[n]:offsets[n + 1]`, in time order.

    offsets: int64 [u + 1]. items: int64 [events], codes of the item table; any other number is an item that no model
    knows. positive: bool [events], whether the event's label is a positive one.
    """

    offsets: np.ndarray
    items: np.ndarray
    positive: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, items: Sequence[int] | np.ndarray = (), positive: Sequence[bool] | np.ndarray | None = None):
        """The history of one user; all events are positive if `positive` is not given.

        Raises:
            DataError: arrays that do not match, or codes that are no whole numbers.
        """
        items = np.asarray(items)
        if items.ndim != 1 or (len(items) and items.dtype.kind not in "iu"):
            raise DataError(f"a history must be item codes [events], got {items.dtype} {items.shape}: look the ids up")
        positive = np.ones(len(items), bool) if positive is None else np.asarray(positive, dtype=bool)
        if positive.shape != items.shape:
            raise DataError(
                f"a history of {len(items)} items needs as many labels, got shape {positive.shape}: give one an event"
            )
        return cls(np.array([0, len(items)]), items.astype(np.int64), positive)

    @classmethod
    def before(cls, log: BehaviorLog, labels: np.ndarray, users: np.ndarray, moments: np.ndarray) -> Histories:
        """What each of `users` (codes [u]) did strictly before its moment [u], so that a basket sees none of itself.

        labels: int [rows], 1, 0, or -1 for rows to leave out; see `signs`.
        """
        kept = np.flatnonzero(labels >= 0)
        times, ranks = np.unique(log.timestamps[kept], return_inverse=True)
        # The log's rows go by user, then time, and so do these keys.
        keys = log.user_codes[kept] * np.int64(len(times) + 1) + ranks
        users = np.asarray(users, np.int64) * (len(times) + 1)
        begin, end = np.searchsorted(keys, users), np.searchsorted(keys, users + np.searchsorted(times, moments))
        rows = kept[_ranges(begin, end)]
        return cls(np.concatenate([[0], np.cumsum(end - begin)]), log.item_codes[rows].astype(np.int64),
                   labels[rows] == 1)  # fmt: skip

    @property
    def counts(self) -> np.ndarray:
        """Events of each user, int64 [u]."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """User number of each event, int64 [events]."""
        return np.repeat(np.arange(len(self)), self.counts)

    def part(self, start: int, stop: int) -> Histories:
        """Users start to stop - 1."""
        begin, end = self.offsets[start], self.offsets[stop]
        return Histories(self.offsets[start : stop + 1] - begin, self.items[begin:end], self.positive[begin:end])

    def parts(self, events: int, users: int) -> list[tuple[int, int]]:
        """(start, stop) of runs of users with at most so many events and users, one user at least."""
        cuts, start = [], 0
        while start < len(self):
            stop = int(np.searchsorted(self.offsets, self.offsets[start] + events, "right")) - 1
            cuts.append((start, min(max(start + 1, stop), start + users)))
            start = cuts[-1][1]
        return cuts

    def matrix(self, num_items: int) -> sp.csr_matrix:
        """Users by items, float32 [u, items], duplicates and unknown items removed; see `user_items`."""
        known = (self.items >= 0) & (self.items < num_items)
        return user_items(self.owners[known], self.items[known], self.positive[known], (len(self), num_items))


def user_items(users: np.ndarray, items: np.ndarray, positive: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """A sparse matrix with an entry for each pair met: 1 if any of its events was positive, and a stored 0 if none."""
    matrix = sp.coo_matrix((positive.astype(np.float32), (users, items)), shape=shape).tocsr()
    matrix.sort_indices()
    np.minimum(matrix.data, 1, out=matrix.data)
    return matrix


def feedback(log: BehaviorLog, domain: Domain) -> np.ndarray:
    """int8 [rows]: 0 for the domain's negative class, 1 for any other, -1 for rows that its label rule leaves out."""
    classes = domain.classes(log)
    return np.where(classes < 0, -1, classes != domain.negative_class).astype(np.int8)


def _ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The numbers begin[0] ... end[0] - 1, begin[1] ... end[1] - 1, and so on."""
    sizes = end - begin
    starts = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) + np.repeat(begin - starts, sizes)
