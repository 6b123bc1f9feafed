"""Histories of users before a moment, as arrays of item codes: the only input of a collaborative model about a user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import DataError


@dataclass(frozen=True)
class Histories:
    """Events of u users. Those of user n are `offsets[n]:offsets[n + 1]`, in time order.

    Attributes:
        offsets: int64 [u + 1].
        items: int64 [e], codes of the item table; any other number is an unknown item.
        positive: bool [e], whether the event's label is a positive one.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    positive: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, items: ArrayLike = (), positive: ArrayLike | None = None) -> Self:
        """The history of one user; all events are positive if `positive` is not given.

        Raises:
            DataError: arrays that do not match, or codes that are not whole numbers.
        """
        codes = np.asarray(items)
        if codes.ndim != 1 or (len(codes) and codes.dtype.kind not in "iu"):
            raise DataError(f"a history must be item codes [events], got {codes.dtype} {codes.shape}: look the ids up")
        flags = np.ones(len(codes), bool) if positive is None else np.asarray(positive, dtype=bool)
        if flags.shape != codes.shape:
            raise DataError(
                f"a history of {len(codes)} items needs as many labels, got shape {flags.shape}: give one per event"
            )
        return cls(np.array([0, len(codes)]), codes.astype(np.int64), flags)

    @classmethod
    def before(cls, log: BehaviorLog, labels: np.ndarray, users: np.ndarray, moments: np.ndarray) -> Self:
        """Events of each of `users` (codes [u]) strictly before its moment [u], so that a basket sees none of itself.

        labels: int [rows], 1, 0, or -1 for rows to leave out; see `feedback`.
        """
        labelled = np.flatnonzero(labels >= 0)
        times, ranks = np.unique(log.timestamps[labelled], return_inverse=True)
        # One sorted key a row, user * (times + 1) + rank of the time: the log's rows go by user, then time.
        keys = log.user_codes[labelled] * np.int64(len(times) + 1) + ranks
        users = np.asarray(users, np.int64) * (len(times) + 1)
        begin, end = np.searchsorted(keys, users), np.searchsorted(keys, users + np.searchsorted(times, moments))
        rows = labelled[_ranges(begin, end)]
        offsets = np.concatenate([[0], np.cumsum(end - begin)])
        return cls(offsets, log.item_codes[rows].astype(np.int64), labels[rows] == 1)

    @classmethod
    def from_rows(cls, log: BehaviorLog, rows: np.ndarray, positive: np.ndarray | None = None) -> Self:
        """Sorted rows [e] of a log as the histories of all its users; all events are positive if not given."""
        offsets = np.searchsorted(rows, log.user_offsets)
        positive = np.ones(len(rows), bool) if positive is None else positive
        return cls(offsets, log.item_codes[rows].astype(np.int64), positive)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Events of each user, int64 [u]."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> NDArray[np.int64]:
        """User number of each event, int64 [e]."""
        return np.repeat(np.arange(len(self)), self.counts)

    def part(self, start: int, stop: int) -> Histories:
        """Users start to stop - 1."""
        begin, end = self.offsets[start], self.offsets[stop]
        return Histories(self.offsets[start : stop + 1] - begin, self.items[begin:end], self.positive[begin:end])

    def parts(self, events: int, users: int) -> list[tuple[int, int]]:
        """(start, stop) of runs of users with at most `events` events and `users` users, one user at least."""
        cuts: list[tuple[int, int]] = []
        start = 0
        while start < len(self):
            # The last user whose events still fit; a longer user goes alone.
            stop = int(np.searchsorted(self.offsets, self.offsets[start] + events, "right")) - 1
            cuts.append((start, min(max(start + 1, stop), start + users)))
            start = cuts[-1][1]
        return cuts

    def where(self, mask: np.ndarray) -> Histories:
        """The events marked in bool [e], of the same users."""
        before = np.concatenate([[0], np.cumsum(mask)])
        return Histories(before[self.offsets], self.items[mask], self.positive[mask])

    def positives(self) -> Histories:
        """The positive events."""
        return self.where(self.positive)

    def newest(self, count: int) -> Histories:
        """The last event of each of a user's `count` newest different items."""
        owners = self.owners
        reverse = np.arange(len(owners))[::-1]
        # `unique` gives the first index of each (user, item), which in reverse order is its last event.
        _, last = np.unique(np.column_stack([owners[reverse], self.items[reverse]]), axis=0, return_index=True)
        latest = np.sort(reverse[last])
        sizes = np.bincount(owners[latest], minlength=len(self))
        position = np.arange(len(latest)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        mask = np.zeros(len(owners), bool)
        mask[latest[position >= np.repeat(sizes - count, sizes)]] = True
        return self.where(mask)

    def matrix(self, num_items: int) -> sp.csr_matrix:
        """Users by items, float32 [u, num_items], without duplicates and unknown items; see `user_items`."""
        known = (self.items >= 0) & (self.items < num_items)
        return user_items(self.owners[known], self.items[known], self.positive[known], (len(self), num_items))


def user_items(users: np.ndarray, items: np.ndarray, positive: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """A sparse matrix [users, items] with an entry for each pair met: 1 if any event was positive, else a stored 0."""
    matrix = sp.coo_matrix((positive.astype(np.float32), (users, items)), shape=shape).tocsr()
    matrix.sort_indices()
    np.minimum(matrix.data, 1, out=matrix.data)  # `tocsr` summed duplicates, stored zeros stay
    return matrix


def feedback(log: BehaviorLog, domain: Domain) -> NDArray[np.int8]:
    """int8 [rows]: 0 for the domain's negative class, 1 for any other, -1 for rows that its label rule leaves out."""
    classes = domain.classes(log)
    return np.where(classes < 0, -1, classes != domain.negative_class).astype(np.int8)


def _ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The numbers begin[0] ... end[0] - 1, then begin[1] ... end[1] - 1, and so on."""
    sizes = end - begin
    starts = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) + np.repeat(begin - starts, sizes)
