"""Sampled negatives for logs that hold only positives, drawn from the past of each positive.

The rule is the same in every split: a negative of a positive at time t is never an item that its user has in the log at
t or before, in any split. An item that the user takes later may be a negative: excluding it would leak the future.

Each positive gets its own list. The sampling is exact: each slot follows the popularity (or uniform) distribution over
the items known strictly before the positive's time, conditioned on neither the user nor the list having the item.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmrec_peft.data.log import BehaviorLog, LogSplit
from llmrec_peft.errors import DataError

SAMPLING = ("popularity", "uniform")
"""The distributions that negatives can be drawn from."""

ROUNDS = 16  # rejections of one slot before the exact, slower method finishes its list
CELLS = 4_000_000  # of the exact method's (positive, item) matrix at a time: 32 MB an array

NONE = -1
"""Fills a slot for which no item is available."""


def sample_negatives(
    split: LogSplit,
    *,
    per_positive: int,
    sampling: str,
    seed: int,
    positives: np.ndarray | None = None,
    source: np.ndarray | None = None,
    past_only: bool = True,
) -> np.ndarray:
    """Sample items that the users had not taken before.

    Args:
        split: the log, and the rows that negatives are drawn for. A list never has an item that its user has in the
            log at the positive's time or before, with any label and in any split.
        per_positive: items in each list, at least 1.
        sampling: `popularity` (in proportion to an item's earlier source rows) or `uniform` (items that have any).
        seed: random seed.
        positives: row numbers to draw for; by default `split.rows`.
        source: row numbers that define popularity and the known items; by default every row of the log. For a split by
            user give the training rows.
        past_only: count only source rows strictly earlier than the positive. With False all source rows count, and a
            list never has an item that its user has anywhere in the log.

    Returns:
        int32 [len(positives), per_positive] item codes, no item twice in a row of it; -1 where fewer were available.

    Raises:
        DataError: an unknown `sampling`, `per_positive` below 1, or row numbers outside the log.
    """
    if sampling not in SAMPLING:
        raise DataError(
            f"negatives: sampling must be one of {', '.join(SAMPLING)}, not {sampling!r}; "
            "set negatives.sampling in the domain file"
        )
    if per_positive < 1:
        raise DataError(f"negatives: per_positive must be at least 1, not {per_positive}; leave the call out for none")
    log = split.log
    positives = _rows(split.rows if positives is None else positives, len(log), "positives")
    source = _rows(np.arange(len(log)) if source is None else source, len(log), "source")
    if not len(source):
        raise DataError("negatives: source has no rows, so no item is known; give the training rows")

    past = _Past.of(log.item_codes[source], log.timestamps[source])
    users = log.user_codes[positives].astype(np.int64)
    moments = log.timestamps[positives] if past_only else np.full(len(positives), np.inf)
    known = past.known(moments)
    taken = _Taken.of(log, users, moments)
    rng = np.random.default_rng(seed)

    out = np.full((len(positives), per_positive), NONE, dtype=np.int32)
    unfinished = _fill_by_rejection(out, known, past, taken, sampling, rng)
    _fill_exactly(out, unfinished, known, past, taken, sampling, rng)
    return out


def _rows(rows: np.ndarray, size: int, name: str) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.int64)
    wrong = rows[(rows < 0) | (rows >= size)]
    if len(wrong):
        raise DataError(
            f"negatives: {name} has row {wrong[0]}, but the log has {size} rows; give row numbers of the log"
        )
    return rows


@dataclass(frozen=True)
class _Known:
    """Counts of source rows, and of items, strictly before each positive; int64 [n] each."""

    rows: np.ndarray
    items: np.ndarray


@dataclass(frozen=True)
class _Past:
    """The source rows in time order, so that "before t" is a prefix of the arrays; S rows of I items.

    Attributes:
        items, times: [S], item code and time of each source row.
        first_items, first_times: [I], the items in order of their first row, and its time.
        by_item: int64 [S], sorted codes `rank * S + position`, where rank is an item's place in `first_items`; two
            binary searches count an item's rows in any prefix.
    """

    items: np.ndarray
    times: np.ndarray
    first_items: np.ndarray
    first_times: np.ndarray
    by_item: np.ndarray

    @classmethod
    def of(cls, items: np.ndarray, times: np.ndarray) -> _Past:
        order = np.argsort(times, kind="stable")
        items, times = items[order], times[order]
        codes, firsts, inverse = np.unique(items, return_index=True, return_inverse=True)
        by_first = np.argsort(firsts)
        rank = np.empty(len(codes), dtype=np.int64)
        rank[by_first] = np.arange(len(codes))
        by_item = np.sort(rank[inverse] * len(items) + np.arange(len(items)))
        return cls(items, times, codes[by_first], times[firsts[by_first]], by_item)

    def known(self, moments: np.ndarray) -> _Known:
        # side="left": a row of the same moment is not the past.
        return _Known(np.searchsorted(self.times, moments), np.searchsorted(self.first_times, moments))

    def counts(self, prefixes: np.ndarray, items: int) -> np.ndarray:
        """Rows of each of the first `items` items in each prefix of the source, int64 [len(prefixes), items]."""
        starts = np.arange(items, dtype=np.int64) * len(self.items)
        ends = np.searchsorted(self.by_item, starts[None, :] + prefixes[:, None])
        return ends - np.searchsorted(self.by_item, starts)[None, :]


@dataclass(frozen=True)
class _Taken:
    """The items that the users had taken by the times of their positives.

    Attributes:
        users, moments: [n], user code and time of each positive.
        keys: int64 [pairs], sorted distinct codes `user * num_items + item` of the log's rows.
        since: [pairs], the time of the first such row.
    """

    users: np.ndarray
    moments: np.ndarray
    keys: np.ndarray
    since: np.ndarray
    num_items: int

    @classmethod
    def of(cls, log: BehaviorLog, users: np.ndarray, moments: np.ndarray) -> _Taken:
        # The log's rows go by user, then time, so that a pair's first row is its earliest.
        keys, first = np.unique(log.user_codes.astype(np.int64) * log.num_items + log.item_codes, return_index=True)
        return cls(users, moments, keys, log.timestamps[first], log.num_items)

    def holds(self, positives: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether the users of `positives` had taken `items`, bool; the two arrays broadcast together."""
        wanted = self.users[positives] * self.num_items + items
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return (self.keys[places] == wanted) & (self.since[places] <= self.moments[positives])


def _fill_by_rejection(
    out: np.ndarray, known: _Known, past: _Past, taken: _Taken, sampling: str, rng: np.random.Generator
) -> np.ndarray:
    """Fill `out` slot by slot by drawing until a draw is allowed; return the positives that ROUNDS did not finish.

    The number of rejections is independent of the item that is accepted in the end, so finishing the rest by the exact
    method does not change the distribution.
    """
    size = known.rows if sampling == "popularity" else known.items
    pool = past.items if sampling == "popularity" else past.first_items
    live = np.flatnonzero(known.items > 0)
    unfinished = []
    for slot in range(out.shape[1]):
        waiting = live
        for _ in range(ROUNDS):
            if not len(waiting):
                break
            drawn = pool[rng.integers(size[waiting])]
            refused = taken.holds(waiting, drawn)
            refused |= (out[waiting, :slot] == drawn[:, None]).any(axis=1)
            out[waiting[~refused], slot] = drawn[~refused]
            waiting = waiting[refused]
        unfinished.append(waiting)
        live = np.setdiff1d(live, waiting, assume_unique=True)
    return np.concatenate(unfinished)


def _fill_exactly(
    out: np.ndarray,
    unfinished: np.ndarray,
    known: _Known,
    past: _Past,
    taken: _Taken,
    sampling: str,
    rng: np.random.Generator,
) -> None:
    """Finish the lists of `unfinished` by weighting every known item.

    The k largest of log(weight) + Gumbel noise are a draw without replacement in proportion to the weights (Efraimidis
    & Spirakis 2006; Gumbel-top-k, Kool et al. 2019): the same distribution as slot-by-slot rejection.
    """
    # Sorted by the number of known items, so that a chunk's matrix is only as wide as its own past.
    unfinished = unfinished[np.argsort(known.items[unfinished], kind="stable")]
    start = 0
    while start < len(unfinished):
        widest = int(known.items[unfinished[-1]])
        chunk = unfinished[start : start + max(1, CELLS // widest)]
        start += len(chunk)
        width = int(known.items[chunk[-1]])
        weights = past.counts(known.rows[chunk], width).astype(np.float64)
        if sampling == "uniform":
            weights = (weights > 0).astype(np.float64)
        items = past.first_items[:width]
        weights[taken.holds(chunk[:, None], items[None, :])] = 0
        for slot in range(out.shape[1]):
            weights[out[chunk, slot][:, None] == items[None, :]] = 0
        with np.errstate(divide="ignore"):
            keys = np.log(weights) + rng.gumbel(size=weights.shape)
        best = np.argsort(-keys, axis=1, kind="stable")[:, : out.shape[1]]
        ranked = np.where(np.take_along_axis(weights, best, axis=1) > 0, items[best], NONE)
        # A list's filled slots come first; its open ones take the ranked items in order.
        filled = (out[chunk] != NONE).sum(axis=1)
        slots = np.arange(out.shape[1])[None, :] - filled[:, None]
        available = (slots >= 0) & (slots < ranked.shape[1])
        values = np.take_along_axis(ranked, np.clip(slots, 0, ranked.shape[1] - 1), axis=1)
        out[chunk] = np.where(slots < 0, out[chunk], np.where(available, values, NONE))
