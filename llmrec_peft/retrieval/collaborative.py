"""Models that know items by who took them, not by their text: popularity, co-occurrence, factors and rates.

They are fitted on the training rows of a log and know a user by a history alone, so that a new user needs no place in
them. Every model scores pairs, scores the whole catalogue, and names its best items:

    model.fit(log, rows, labels)                     labels: int [rows of the log], 1, 0, or -1 for none (`signs`)
    model.score(history, candidates)                 float64 [candidates], finite, higher is better
    model.top(history, k, exclude)                   item codes int64 [at most k], best first; ties by the lower code

Items are codes of the log's item table. A code that the table had not, or that no training row met, is an unknown item:
it scores the model's neutral value (0, or the overall rate) and is never named. Nothing holds users times items: time
and memory go with the rows, and with the items times the neighbours or the rank.

u: users, n: pairs, e: events of the histories.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.baselines import STRENGTH
from llmrec_peft.retrieval.factors import Penalty, Side, factorise, half_step
from llmrec_peft.retrieval.histories import Histories, user_items

DAY = 86_400.0
CELLS = 4_000_000  # numbers of a block of pairs or scores


class _Unfitted(dict):
    def __missing__(self, name: str):
        raise ConfigError(f"a model without {name!r} is not fitted; call fit, or load it")


@dataclass
class CollaborativeModel(ABC):
    """What all models share. Settings are dataclass fields, checked by `_check`; what `fit` finds is in `arrays`."""

    NAME: ClassVar[str] = ""
    ARRAYS: ClassVar[dict[str, str]] = {}
    """Name of each fitted array and its kind: "items" ([items, ...]), or "total" (not by item)."""

    arrays: dict[str, np.ndarray] = field(default_factory=lambda: _Unfitted(), init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:  # noqa: B027 - most models have settings to check, not all
        """Raise ConfigError for a setting out of range."""

    @abstractmethod
    def _fit(self, log: BehaviorLog, rows: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
        """The fitted arrays; rows int64 [r] and positive bool [r] are checked."""

    @abstractmethod
    def score_all(self, histories: Histories) -> np.ndarray:
        """Scores [u, items], -inf for an item that the model has no reason to name. May be a read-only view."""

    @abstractmethod
    def score_pairs(self, histories: Histories, owners: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """float64 [n]: what user `owners[n]` of the histories makes of item `candidates[n]`; always finite."""

    def fit(self, log: BehaviorLog, rows: np.ndarray, labels: np.ndarray) -> Self:
        """Learn from `rows` (row numbers) of the log alone; those with label -1 are left out.

        Raises:
            DataError: rows outside the log, labels that do not match it, or no positive row.
        """
        rows, labels = np.asarray(rows, np.int64), np.asarray(labels)
        if labels.shape != (len(log),) or not np.isin(labels, (-1, 0, 1)).all():
            raise DataError(
                f"{self.NAME} needs labels 1, 0 or -1 of all {len(log)} rows of log {log.name!r}, got shape "
                f"{labels.shape}; make them with signs(log, domain)"
            )
        if len(rows) and (rows.min() < 0 or rows.max() >= len(log)):
            raise DataError(f"{self.NAME}: rows must be numbers from 0 to {len(log) - 1}; give the split's rows")
        # Sorted, so that sums do not depend on the order given; the log's rows go by user, then time.
        rows = np.sort(rows[labels[rows] >= 0])
        positive = labels[rows] == 1
        if not positive.any():
            raise DataError(
                f"{self.NAME} has no positive among {len(rows)} labelled rows of log {log.name!r} to learn from; "
                "give the training rows, or correct the domain's labels"
            )
        self._set(self._fit(log, rows, positive))
        return self

    def _set(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        for kind in type(self).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    self.__dict__.pop(name, None)

    @property
    def num_items(self) -> int:
        """Items of the table that the arrays are in."""
        return len(self.arrays[next(name for name, kind in self.ARRAYS.items() if kind == "items")])

    def sound(self, num_items: int) -> bool:
        """Whether the arrays, read from a file, are finite and fit each other and so many items."""
        by_item = [self.arrays[name] for name, kind in self.ARRAYS.items() if kind == "items"]
        return all(len(array) == num_items for array in by_item) and all(
            np.isfinite(array).all() for array in self.arrays.values()
        )

    def settings(self) -> dict[str, Any]:
        """The dataclass fields that make the model."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.init}

    def recode(self, places: np.ndarray) -> Self:
        """This model for another item table: item i of it is item `places[i]` of the present one, or none (-1)."""
        other = dataclasses.replace(self)
        other._set({
            name: _at(value, places) if self.ARRAYS[name] == "items" else value for name, value in self.arrays.items()
        })  # fmt: skip
        return other

    def score(self, history: Histories, candidates: Sequence[int] | np.ndarray) -> np.ndarray:
        """float64 [candidates]: scores for the one user of `history` (`Histories.of(items, positive)`)."""
        candidates = np.asarray(candidates, np.int64)
        return self.score_pairs(history, np.zeros(len(candidates), np.int64), candidates)

    def top(self, history: Histories, k: int, exclude: Sequence[int] | np.ndarray = ()) -> np.ndarray:
        """Item codes int64 [at most k] for the one user of `history`, best first, without those to exclude."""
        scores = np.array(self.score_all(history)[0])
        scores[inside(exclude, self.num_items)] = -np.inf
        return best(scores, k)

    def _item(self, name: str, candidates: np.ndarray) -> np.ndarray:
        """An item array [n, ...] at the candidates, zeros for unknown ones."""
        return _at(self.arrays[name], candidates)


@dataclass
class Popularity(CollaborativeModel):
    """How often an item was taken, an event of `half_life` days ago counting half; the time is that of the last row.

    The score is log(1 + weight), which suits a regression.
    """

    NAME: ClassVar[str] = "popularity"
    ARRAYS: ClassVar[dict[str, str]] = {"weights": "items"}

    half_life: float | None = None
    """Days; None counts all events alike, which is for logs without real times."""

    def _check(self) -> None:
        if self.half_life is not None and not self.half_life > 0:
            raise ConfigError(f"popularity: half_life must be days above 0 or None, not {self.half_life}; correct it")

    def _fit(self, log, rows, positive):
        taken, weight = rows[positive], None
        if self.half_life is not None:
            age = (log.timestamps[rows].max() - log.timestamps[taken]) / (self.half_life * DAY)
            weight = np.maximum(np.exp2(-age), np.finfo(np.float32).tiny)  # old is little, and not nothing
        counts = np.bincount(log.item_codes[taken], weight, log.num_items)
        return {"weights": counts.astype(np.float64)}

    def score_all(self, histories):
        weights = self.arrays["weights"]
        row = np.where(weights > 0, np.log1p(weights), -np.inf)
        return np.broadcast_to(row, (len(histories), len(row)))

    def score_pairs(self, histories, owners, candidates):
        return np.log1p(self._item("weights", candidates))


@dataclass
class ItemCooccurrence(CollaborativeModel):
    """Item-based nearest neighbours (Sarwar et al., WWW 2001) over the positives.

        similarity(i, j) = users of both / (sqrt(users of i * users of j) + shrink)

    An item keeps its `neighbours` nearest; a candidate's score is the sum of its similarities to the history's newest
    `newest` positive items, each once. Of a user with more than `longest` positive items the newest are taken in fit,
    so that fit takes at most rows x longest products.
    """

    NAME: ClassVar[str] = "cooccurrence"
    ARRAYS: ClassVar[dict[str, str]] = {"counts": "items", "starts": "total", "near": "total", "similarity": "total"}

    neighbours: int = 50
    shrink: float = 10.0
    newest: int = 50
    longest: int = 1000

    def _check(self) -> None:
        if min(self.neighbours, self.newest, self.longest) < 1 or not self.shrink >= 0:
            raise ConfigError(f"cooccurrence: settings must be 1 or more and shrink 0 or more, got {self.settings()}")

    def _fit(self, log, rows, positive):
        matrix = _newest(_split(log, rows[positive]), self.longest).matrix(log.num_items)
        counts = np.bincount(matrix.indices, minlength=log.num_items)
        across = matrix.T.tocsr()
        blocks = []
        for start, stop in _blocks(across @ np.diff(matrix.indptr), CELLS):
            both = (across[start:stop] @ matrix).tocoo()
            row, column = both.row + start, both.col
            value = both.data / (np.sqrt(counts[row] * counts[column]) + self.shrink)
            other = row != column
            blocks.append(_nearest(row[other], column[other], value[other], self.neighbours))
        row, near, similarity = (np.concatenate(part) for part in zip(*blocks, strict=True))
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=log.num_items))])
        return {
            "counts": counts.astype(np.int64),
            "starts": starts.astype(np.int64),
            "near": near.astype(np.int32),
            "similarity": similarity.astype(np.float32),
        }

    @cached_property
    def similarities(self) -> sp.csr_matrix:
        """float32 [items, items]: each item's nearest."""
        arrays, size = self.arrays, self.num_items
        return sp.csr_matrix((arrays["similarity"], arrays["near"], arrays["starts"]), shape=(size, size))

    def recode(self, places):
        moved = self.similarities
        known = np.flatnonzero(places >= 0)
        back = sp.csr_matrix((np.ones(len(known), np.float32), (known, places[known])), (len(places), self.num_items))
        moved = (back @ moved @ back.T).tocsr()
        moved.sort_indices()
        other = dataclasses.replace(self)
        other._set({
            "counts": _at(self.arrays["counts"], places), "starts": moved.indptr.astype(np.int64),
            "near": moved.indices.astype(np.int32), "similarity": moved.data.astype(np.float32),
        })  # fmt: skip
        return other

    def sound(self, num_items):
        starts, near = self.arrays["starts"], self.arrays["near"]
        return (
            super().sound(num_items)
            and len(starts) == num_items + 1
            and starts[0] == 0
            and bool((np.diff(starts) >= 0).all())
            and starts[-1] == len(near) == len(self.arrays["similarity"])
            and bool(((near >= 0) & (near < num_items)).all())
        )

    def _sums(self, histories: Histories) -> sp.csr_matrix:
        return _newest(_positives(histories), self.newest).matrix(self.num_items) @ self.similarities

    def score_all(self, histories):
        scores = self._sums(histories).toarray()
        scores[scores <= 0] = -np.inf
        return scores

    def score_pairs(self, histories, owners, candidates):
        known, result = _inside(candidates, self.num_items), np.zeros(len(candidates))
        for users, pairs in _grouped(histories, owners, CELLS // max(1, self.neighbours)):
            pairs = pairs[known[pairs]]
            if len(pairs):
                sums = self._sums(histories.part(users.start, users.stop))
                result[pairs] = np.asarray(sums[owners[pairs] - users.start, candidates[pairs]]).ravel()
        return result


@dataclass
class _Factors(CollaborativeModel):
    """Vectors of the items, and a user's vector folded in from a history by the half-step that training takes."""

    ARRAYS: ClassVar[dict[str, str]] = {"factors": "items", "gram": "total", "known": "total"}

    @property
    @abstractmethod
    def _penalty(self) -> Penalty: ...

    @abstractmethod
    def _targets(self, histories: Histories) -> sp.csr_matrix:
        """What the users' vectors are fitted to, [u, items]; only items that have a vector."""

    @cached_property
    def side(self) -> Side:
        """The items' vectors as half-steps take them."""
        return Side(self.arrays["factors"], self.arrays["gram"], int(self.arrays["known"][0]))

    def _vectors(self, matrix: sp.csr_matrix) -> dict[str, np.ndarray]:
        """The fitted arrays. The sums over all items are kept, so that a changed item table changes no user."""
        side = Side(factorise(matrix, self.rank, self.rounds, self._penalty, self.seed))
        return {"factors": side.vectors, "gram": side.gram, "known": np.array([side.num_known], np.int64)}

    def sound(self, num_items):
        shapes = [self.arrays[name].shape for name in ("factors", "gram", "known")]
        return super().sound(num_items) and shapes == [(num_items, self.rank), (self.rank, self.rank), (1,)]

    def fold_in(self, histories: Histories) -> np.ndarray:
        """Vectors of users, float32 [u, rank]; zeros for a user of whom nothing is known."""
        known = _inside(histories.items, self.num_items)
        known[known] = self.side.known[histories.items[known]]
        return half_step(self._targets(_only(histories, known)), self.side, self._penalty)

    def score_all(self, histories):
        users = self.fold_in(histories)
        scores = users @ self.side.vectors.T
        scores[:, ~self.side.known] = -np.inf
        scores[~users.any(axis=1)] = -np.inf
        return scores

    def score_pairs(self, histories, owners, candidates):
        result = np.zeros(len(candidates))
        for users, pairs in _grouped(histories, owners, CELLS // self.side.rank):
            vectors = self.fold_in(histories.part(users.start, users.stop))
            for part in np.array_split(pairs, 1 + len(pairs) * self.side.rank // CELLS):
                items = self._item("factors", candidates[part])
                result[part] = np.einsum("nd,nd->n", vectors[owners[part] - users.start], items)
        return result


@dataclass
class MatrixFactorisation(_Factors):
    """Implicit matrix factorisation of the positives; the score is near 1 for what the user would take, near 0 else."""

    NAME: ClassVar[str] = "factors"

    rank: int = 64
    background: float = 0.4
    """Weight of an item that the user did not take, beside 1 + background of one that was taken."""
    strength: float = 0.005
    rounds: int = 10
    seed: int = 0

    def _check(self) -> None:
        if min(self.rank, self.rounds) < 1 or not (self.background > 0 and self.strength > 0):
            raise ConfigError(f"{self.NAME}: rank and rounds must be 1 or more, weights above 0, got {self.settings()}")

    @property
    def _penalty(self):
        return Penalty(self.background, self.strength)

    def _fit(self, log, rows, positive):
        taken = rows[positive]
        shape = (log.num_users, log.num_items)
        matrix = user_items(log.user_codes[taken], log.item_codes[taken], np.ones(len(taken), bool), shape)
        return self._vectors(matrix)

    def _targets(self, histories):
        return _positives(histories).matrix(self.num_items)


@dataclass
class LabelFactors(_Factors):
    """Matrix factorisation of the labels, for logs with both outcomes: what user and item rates leave unexplained.

    The score is the label's expected distance from the sum of the item's and the user's rates, in probability. On a log
    of positives alone it is near 0 throughout. It never names items: to like a thing is not to meet it.
    """

    NAME: ClassVar[str] = "label_factors"
    ARRAYS: ClassVar[dict[str, str]] = {**_Factors.ARRAYS, "rate": "items", "overall": "total"}

    rank: int = 16
    strength: float = 0.1
    rounds: int = 10
    seed: int = 0

    def _check(self) -> None:
        if min(self.rank, self.rounds) < 1 or not self.strength > 0:
            raise ConfigError(f"{self.NAME}: rank and rounds must be 1 or more, strength above 0: {self.settings()}")

    @property
    def _penalty(self):
        return Penalty(0.0, self.strength)

    def _fit(self, log, rows, positive):
        rates = UserItemRates()
        rates._set(rates._fit(log, rows, positive))
        self.arrays = {"rate": rates.item_rates() - rates.overall, "overall": np.array([rates.overall])}
        matrix = self._left(_split(log, rows, positive), log.num_items)
        return self._vectors(matrix) | self.arrays

    def _left(self, histories: Histories, num_items: int) -> sp.csr_matrix:
        """Label minus rates for each pair met, [u, items]."""
        matrix = histories.matrix(num_items)
        counts = np.diff(matrix.indptr)
        overall = self.arrays["overall"][0]
        rest = matrix.data - overall - self.arrays["rate"][matrix.indices]
        # The user's rate, smoothed towards 0 distance from what its items lead one to expect.
        user = np.add.reduceat(np.r_[rest, 0.0], np.minimum(matrix.indptr[:-1], len(rest)))
        user = np.where(counts > 0, user, 0.0) / (counts + STRENGTH)
        matrix.data = (rest - np.repeat(user, counts)).astype(np.float32)
        return matrix

    def _targets(self, histories):
        return self._left(histories, self.num_items)

    def score_all(self, histories):
        return np.broadcast_to(np.float32(-np.inf), (len(histories), self.num_items))


@dataclass
class UserItemRates(CollaborativeModel):
    """Smoothed shares of positives, of the item's training rows and of the user's history, as log-odds.

        rate = (positives + STRENGTH * overall) / (rows + STRENGTH)

    as in `evaluation.baselines`, but counted over the training rows alone. The score is the item's plus the user's
    log-odds less the overall ones; `item_logits` and `user_logits` give them apart.
    """

    NAME: ClassVar[str] = "rates"
    ARRAYS: ClassVar[dict[str, str]] = {"rows": "items", "positives": "items", "totals": "total"}

    def _fit(self, log, rows, positive):
        items = log.item_codes[rows]
        counts = np.bincount(items, minlength=log.num_items)
        taken = np.bincount(items[positive], minlength=log.num_items)
        totals = np.array([len(rows), positive.sum()], np.int64)
        return {"rows": counts.astype(np.int64), "positives": taken.astype(np.int64), "totals": totals}

    @property
    def overall(self) -> float:
        """Rate of all training rows, smoothed towards 1/2."""
        rows, positives = self.arrays["totals"]
        return float((positives + STRENGTH / 2) / (rows + STRENGTH))

    def item_rates(self) -> np.ndarray:
        """float64 [items]."""
        return self._rate(self.arrays["positives"], self.arrays["rows"])

    def item_logits(self, candidates: np.ndarray) -> np.ndarray:
        """float64 [n]; those of the overall rate for unknown items."""
        return _logit(self._rate(self._item("positives", candidates), self._item("rows", candidates)))

    def user_logits(self, histories: Histories) -> np.ndarray:
        """float64 [u]; those of the overall rate without a history."""
        positives = np.bincount(histories.owners, histories.positive, len(histories))
        return _logit(self._rate(positives, histories.counts))

    def score_all(self, histories):
        items = _logit(self.item_rates())
        items = np.where(self.arrays["rows"] > 0, items, -np.inf)
        return self.user_logits(histories)[:, None] + (items - _logit(self.overall))[None, :]

    def score_pairs(self, histories, owners, candidates):
        return self.user_logits(histories)[owners] + self.item_logits(candidates) - _logit(self.overall)

    def _rate(self, positives: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return (positives + STRENGTH * self.overall) / (rows + STRENGTH)


MODELS: dict[str, type[CollaborativeModel]] = {
    kind.NAME: kind for kind in (Popularity, ItemCooccurrence, MatrixFactorisation, LabelFactors, UserItemRates)
}
"""All models by name."""


# ---- helpers --------------------------------------------------------------------------------------------------------


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Places int64 [at most k] of the highest scores, best first, ties by the lower place; -inf is never taken."""
    k = min(k, int((scores > -np.inf).sum()))
    if k <= 0:
        return np.empty(0, np.int64)
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > least)
    level = np.flatnonzero(scores == least)[: k - len(above)]
    places = np.concatenate([above, level])
    return places[np.lexsort((places, -scores[places]))]


def inside(codes: Sequence[int] | np.ndarray, num_items: int) -> np.ndarray:
    """Those of the codes that the table has, int64."""
    codes = np.asarray(codes, np.int64).ravel()
    return codes[_inside(codes, num_items)]


def _inside(codes: np.ndarray, num_items: int) -> np.ndarray:
    return (codes >= 0) & (codes < num_items)


def _at(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Rows of an item array, zeros where the code is none of its rows."""
    known = _inside(codes, len(values))
    result = np.zeros((len(codes), *values.shape[1:]), values.dtype)
    result[known] = values[codes[known]]
    return result


def _logit(rate):
    return np.log(rate) - np.log1p(-rate)


def _split(log: BehaviorLog, rows: np.ndarray, positive: np.ndarray | None = None) -> Histories:
    """Sorted rows of a log as the histories of all its users."""
    offsets = np.searchsorted(rows, log.user_offsets)
    positive = np.ones(len(rows), bool) if positive is None else positive
    return Histories(offsets, log.item_codes[rows].astype(np.int64), positive)


def _only(histories: Histories, kept: np.ndarray) -> Histories:
    """The events marked in bool [e]."""
    before = np.concatenate([[0], np.cumsum(kept)])
    return Histories(before[histories.offsets], histories.items[kept], histories.positive[kept])


def _positives(histories: Histories) -> Histories:
    return _only(histories, histories.positive)


def _newest(histories: Histories, count: int) -> Histories:
    """The last events of each user that name its `count` newest different items."""
    owners = histories.owners
    reverse = np.arange(len(owners))[::-1]
    _, last = np.unique(np.column_stack([owners[reverse], histories.items[reverse]]), axis=0, return_index=True)
    latest = np.sort(reverse[last])
    sizes = np.bincount(owners[latest], minlength=len(histories))
    place = np.arange(len(latest)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    kept = np.zeros(len(owners), bool)
    kept[latest[place >= np.repeat(sizes - count, sizes)]] = True
    return _only(histories, kept)


def _blocks(timings: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs with a sum of costs of at most `limit`, or of one."""
    sums = np.concatenate([[0], np.cumsum(timings)])
    start = 0
    while start < len(timings):
        stop = max(start + 1, int(np.searchsorted(sums, sums[start] + limit, "right")) - 1)
        yield start, stop
        start = stop


def _nearest(row: np.ndarray, column: np.ndarray, value: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """The `count` highest values of each row, ties by the lower column; rows rising, then columns."""
    order = np.lexsort((column, -value, row))
    row, column, value = row[order], column[order], value[order]
    first = np.searchsorted(row, row)
    kept = np.flatnonzero(np.arange(len(row)) - first < count)
    kept = kept[np.lexsort((column[kept], row[kept]))]
    return row[kept], column[kept], value[kept]


def _grouped(histories: Histories, owners: np.ndarray, events: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of users with about so many events, and the numbers of their pairs; runs without pairs are left out."""
    order = np.argsort(owners, kind="stable")
    sorted_owners = owners[order]
    for start, stop in histories.parts(events, events):
        begin, end = np.searchsorted(sorted_owners, [start, stop])
        if end > begin:
            yield slice(start, stop), order[begin:end]
