"""What can be counted of a target before its moment: the inputs of gradient boosting and of logistic regression.

A target is a user, an item and a time; sampled negatives are targets like any other. By time, everything is counted
over rows with a strictly earlier timestamp. By user, what is counted of a user is its own earlier rows, and what is
counted of an item is the training rows of other users, at any time (see llmrec_peft/evaluation/baselines.py).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.retrieval.histories import feedback

STRENGTH = 5.0  # of a rate's pull towards the overall one, as in evaluation/baselines.py
NEWEST = 10  # events of a user's newest rate
MOST_VALUES = 50  # of a column that counts as a category


@dataclass(frozen=True)
class Points:
    """Targets: arrays [n] of user codes, item codes, times, rows of the log; label 1 is any but the negative one."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    rows: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, streams: StreamDataset) -> "Points":
        """All targets of a split, in their order."""
        log, rows = streams.log, streams.target_rows
        labels = (streams.target_labels != streams.domain.negative_class).astype(np.int64)
        return cls(log.user_codes[rows].astype(np.int64), streams.target_items.astype(np.int64), log.timestamps[rows],
                   rows, labels)  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)


class Earlier:
    """Sums over events of one key before a time."""

    def __init__(self, keys: np.ndarray, times: np.ndarray, **values: np.ndarray) -> None:
        self._moments, codes = np.unique(times, return_inverse=True)
        self._width = len(self._moments) + 1
        order = np.lexsort((codes, keys))
        self._places = keys[order].astype(np.int64) * self._width + codes[order]
        self._times = np.asarray(times, np.float64)[order]
        self._sums = {name: np.concatenate([[0.0], np.cumsum(value[order])]) for name, value in values.items()}

    def span(self, keys: np.ndarray, times: np.ndarray, newest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Places [n] of the first event and behind the last one that count."""
        keys = np.asarray(keys, np.int64)
        begin = np.searchsorted(self._places, keys * self._width)
        end = np.searchsorted(self._places, keys * self._width + np.searchsorted(self._moments, times))
        return (begin if newest is None else np.maximum(begin, end - newest)), end

    def sums(self, name: str, keys: np.ndarray, times: np.ndarray, newest: int | None = None) -> np.ndarray:
        """Sum [n] of a value over the key's (newest) events strictly before the time."""
        begin, end = self.span(keys, times, newest)
        return self._sums[name][end] - self._sums[name][begin]

    def since(self, keys: np.ndarray, times: np.ndarray, last: bool) -> np.ndarray:
        """Time [n] since the key's last or first event before the time; NaN without one."""
        begin, end = self.span(keys, times)
        place = np.minimum(end - 1 if last else begin, max(0, len(self._times) - 1))
        return np.where(end > begin, np.asarray(times, np.float64) - self._times[place], np.nan)


class OfOthers:
    """Sums over the events of one key and of other users, at any time."""

    def __init__(self, keys: np.ndarray, users: np.ndarray, size: int, **values: np.ndarray) -> None:
        self._size = size
        self._totals = {name: np.bincount(keys, value, size) for name, value in values.items()}
        pairs = users.astype(np.int64) * size + keys
        self._pairs, codes = np.unique(pairs, return_inverse=True)
        self._own = {name: np.bincount(codes, value) for name, value in values.items()}

    def sums(self, name: str, keys: np.ndarray, users: np.ndarray) -> np.ndarray:
        """Sum [n] of a value."""
        pairs = np.asarray(users, np.int64) * self._size + keys
        place = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        own = np.where(self._pairs[place] == pairs, self._own[name][place], 0.0)
        return self._totals[name][keys] - own


class CountFeatures:
    """Counts of one log for one domain.

    Args:
        train_rows: of the split by user, the only rows that tell of items.
        by: `time` or `user`.
    """

    def __init__(self, log: BehaviorLog, domain: Domain, train_rows: np.ndarray, by: str) -> None:
        self._log, self._by, labels = log, by, feedback(log, domain)
        rows = np.flatnonzero(labels >= 0)
        users, items, times = log.user_codes[rows].astype(np.int64), log.item_codes[rows], log.timestamps[rows]
        values = {"rows": np.ones(len(rows)), "positives": (labels[rows] == 1).astype(np.float64)}
        self._user = Earlier(users, times, **values)
        self._pair = Earlier(users * log.num_items + items, times, **values)
        self._groups, self._member = _groups_of(log)
        told = np.isin(rows, train_rows)
        zeros = np.zeros(len(rows), np.int64)
        if by == "time":
            self._item = Earlier(items, times, **values)
            self._all = Earlier(zeros, times, **values)
        else:
            part = {name: value[told] for name, value in values.items()}
            self._item = OfOthers(items[told], users[told], log.num_items, **part)
            self._all = OfOthers(zeros[told], users[told], 1, **part)
        self._taste = self._tastes(users, items, times, values)
        self._columns = self._categories(domain)

    def _tastes(self, users, items, times, values) -> Earlier | None:
        """Events of each user by group of items; an event stands once in each of its item's groups."""
        if not self._groups:
            return None
        event, group = self._member[items].nonzero()
        keys = users[event] * len(self._groups) + group
        return Earlier(keys, times[event], **{name: value[event] for name, value in values.items()})

    def _categories(self, domain: Domain) -> dict[str, tuple[str, np.ndarray]]:
        """Columns of few values that the model's text holds: where each stands, and its codes [rows]."""
        found = {}
        for name in dict.fromkeys((*domain.header_columns, *domain.event_columns)):
            for place, table in (("items", self._log.items), ("interactions", self._log.interactions)):
                if name in table.column_names:
                    codes, values = pd.factorize(table.column(name).to_pandas().astype(str), sort=True)
                    if 1 < len(values) <= MOST_VALUES:
                        found[name] = (place, codes)
                    break
        return found

    def _item_sums(self, counter, name: str, keys: np.ndarray, points: Points) -> np.ndarray:
        return counter.sums(name, keys, points.times if self._by == "time" else points.users)

    def frame(self, points: Points) -> pd.DataFrame:
        """Features of targets, one row each; categories have the dtype of their name."""
        users, items, times = points.users, points.items, points.times
        zeros = np.zeros(len(points), np.int64)
        overall = (self._item_sums(self._all, "positives", zeros, points) + STRENGTH / 2) / (
            self._item_sums(self._all, "rows", zeros, points) + STRENGTH)  # fmt: skip

        def rate(positives: np.ndarray, rows: np.ndarray) -> np.ndarray:
            share = (positives + STRENGTH * overall) / (rows + STRENGTH)
            return np.log(share) - np.log1p(-share)

        user = {name: self._user.sums(name, users, times) for name in ("rows", "positives")}
        item = {name: self._item_sums(self._item, name, items, points) for name in ("rows", "positives")}
        new = {name: self._user.sums(name, users, times, NEWEST) for name in ("rows", "positives")}
        pair = users * self._log.num_items + items
        found = {
            "item_rate": rate(item["positives"], item["rows"]),
            "user_rate": rate(user["positives"], user["rows"]),
            "item_count": np.log1p(item["rows"]),
            "user_count": np.log1p(user["rows"]),
            "newest_rate": rate(new["positives"], new["rows"]),
            "pair_count": self._pair.sums("rows", pair, times),
            "pair_positives": self._pair.sums("positives", pair, times),
            "user_pause": np.log1p(self._user.since(users, times, last=True)),
            "pair_pause": np.log1p(self._pair.since(pair, times, last=True)),
        }
        if self._by == "time":
            found["item_age"] = np.log1p(self._item.since(items, times, last=False))
        if self._taste is not None:
            found |= self._taste_of(users, items, times, rate, overall)
        frame = pd.DataFrame(found)
        for name, (place, codes) in self._columns.items():
            frame[name] = pd.Categorical(codes[items if place == "items" else points.rows],
                                         categories=range(int(codes.max()) + 1))  # fmt: skip
        return frame

    def _taste_of(self, users, items, times, rate, overall) -> dict[str, np.ndarray]:
        """Mean over the item's groups of what the user did in them, and the item's groups themselves."""
        point, group = self._member[items].nonzero()
        keys = users[point] * len(self._groups) + group
        rows, positives = (self._taste.sums(name, keys, times[point]) for name in ("rows", "positives"))
        share = (positives + STRENGTH * overall[point]) / (rows + STRENGTH)
        size = np.maximum(np.bincount(point, minlength=len(items)), 1)
        found = {
            "taste_rate": np.bincount(point, np.log(share) - np.log1p(-share), len(items)) / size,
            "taste_count": np.bincount(point, np.log1p(rows), len(items)) / size,
        }
        return found | {f"group_{number}": self._member[items, number].toarray().ravel()
                        for number in range(len(self._groups))}  # fmt: skip


def _groups_of(log: BehaviorLog):
    """Names of the groups that items stand in (genres or category, parted by `|` or comma), and [items, groups]."""
    import scipy.sparse as sp

    column = next((name for name in ("genres", "category") if name in log.items.column_names), None)
    if column is None:
        return [], None
    texts = [str(text or "") for text in log.items.column(column).to_pylist()]
    parts = [[part.strip() for part in text.replace("|", ",").split(",") if part.strip()] for text in texts]
    names = sorted({part for row in parts for part in row})
    if not 1 < len(names) <= MOST_VALUES:
        return [], None
    number = {name: place for place, name in enumerate(names)}
    rows = np.repeat(np.arange(len(parts)), [len(row) for row in parts])
    columns = [number[part] for row in parts for part in row]
    ones = np.ones(len(rows))
    return names, sp.csr_matrix((ones, (rows, columns)), (len(parts), len(names)))
