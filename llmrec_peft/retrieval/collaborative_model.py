"""Base class of the collaborative models, which know items by the users who took them and not by their text.

Models are fitted on the training rows of a log. They know a user by a history alone, so new users need no fitting.
Every model scores pairs, scores the whole catalogue, and returns its top items:

    model.fit(log, rows, labels)                     labels: int [rows of the log], 1, 0, or -1 for none (`feedback`)
    model.score(history, candidates)                 float64 [candidates], finite, higher is better
    model.top(history, k, exclude)                   item codes int64 [at most k], best first; ties by the lower code

Items are codes of the log's item table. An item outside the table, or without training rows, is unknown: its score is
the model's neutral value (0, or the overall rate), and it is never among the top items. No array is users x items:
time and memory grow with the rows, and with the items times the neighbours or the rank.

Shapes: u users, n pairs, e events of the histories.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.item_codes import Codes, known_codes, rows_at, top_k

Arrays = dict[str, np.ndarray]


class _Unfitted(Arrays):
    """Arrays of a model before `fit`: every access is an error that says so."""

    def __missing__(self, name: str) -> np.ndarray:
        raise ConfigError(f"a model without {name!r} is not fitted; call fit, or load it")


@dataclass
class CollaborativeModel(ABC):
    """Shared part of all models. Settings are dataclass fields, checked by `_check`; fitted arrays are in `arrays`."""

    NAME: ClassVar[str] = ""
    ARRAYS: ClassVar[dict[str, str]] = {}
    """Name of each fitted array and its kind: "items" ([num_items, ...]), or "total" (not by item)."""
    BLOCK_SIZE: ClassVar[int] = 4_000_000
    """Numbers of a block of pairs or scores that is computed at a time."""

    arrays: Arrays = field(default_factory=_Unfitted, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:  # noqa: B027 - most models have settings to check, not all
        """Raise ConfigError for a setting out of range."""

    @abstractmethod
    def _fit(self, log: BehaviorLog, rows: Codes, positive: NDArray[np.bool_]) -> Arrays:
        """The fitted arrays; rows int64 [r] and positive bool [r] are checked and sorted by user, then time."""

    @abstractmethod
    def score_all(self, histories: Histories) -> np.ndarray:
        """Scores [u, num_items], -inf for an item that must not be retrieved. May be a read-only view."""

    @abstractmethod
    def score_pairs(self, histories: Histories, owners: Codes, candidates: Codes) -> np.ndarray:
        """float64 [n]: score of item `candidates[n]` for user `owners[n]` of the histories; always finite."""

    def fit(self, log: BehaviorLog, rows: ArrayLike, labels: ArrayLike) -> Self:
        """Fit on `rows` (row numbers) of the log alone; rows with label -1 are left out.

        Raises:
            DataError: rows outside the log, labels that do not match it, or no positive row.
        """
        rows, labels = np.asarray(rows, np.int64), np.asarray(labels)
        if labels.shape != (len(log),) or not np.isin(labels, (-1, 0, 1)).all():
            raise DataError(
                f"{self.NAME} needs labels 1, 0 or -1 of all {len(log)} rows of log {log.name!r}, got shape "
                f"{labels.shape}; make them with feedback(log, domain)"
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
        self.set_arrays(self._fit(log, rows, positive))
        return self

    def set_arrays(self, arrays: Arrays) -> None:
        """Replace the fitted arrays, and drop the properties that were computed from the former ones."""
        self.arrays = arrays
        for kind in type(self).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    self.__dict__.pop(name, None)

    @property
    def num_items(self) -> int:
        """Items of the table that the arrays are in."""
        return len(self.arrays[next(name for name, kind in self.ARRAYS.items() if kind == "items")])

    def has_valid_arrays(self, num_items: int) -> bool:
        """Whether the arrays, read from a file, are finite and agree with each other and with `num_items`."""
        by_item = [self.arrays[name] for name, kind in self.ARRAYS.items() if kind == "items"]
        return all(len(array) == num_items for array in by_item) and all(
            np.isfinite(array).all() for array in self.arrays.values()
        )

    def settings(self) -> dict[str, Any]:
        """The dataclass fields that the model is built from."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.init}

    def recode(self, old_codes: Codes) -> Self:
        """This model for another item table: its item i is item `old_codes[i]` of the present table, or none (-1)."""
        other = dataclasses.replace(self)
        other.set_arrays({
            name: rows_at(value, old_codes) if self.ARRAYS[name] == "items" else value
            for name, value in self.arrays.items()
        })  # fmt: skip
        return other

    def score(self, history: Histories, candidates: ArrayLike) -> np.ndarray:
        """float64 [candidates]: scores for the one user of `history` (`Histories.of(items, positive)`)."""
        candidates = np.asarray(candidates, np.int64)
        return self.score_pairs(history, np.zeros(len(candidates), np.int64), candidates)

    def top(self, history: Histories, k: int, exclude: ArrayLike = ()) -> Codes:
        """Item codes int64 [at most k] for the one user of `history`, best first, without those in `exclude`."""
        scores = np.array(self.score_all(history)[0])  # a copy: `score_all` may return a view
        scores[known_codes(exclude, self.num_items)] = -np.inf
        return top_k(scores, k)

    def _item(self, name: str, candidates: Codes) -> np.ndarray:
        """An item array [n, ...] at the candidates, zeros for unknown ones."""
        return rows_at(self.arrays[name], candidates)


def pairs_by_user(histories: Histories, owners: Codes, events: int) -> Iterator[tuple[slice, Codes]]:
    """Yield runs of users with about `events` events, and the numbers of their pairs; runs without pairs are skipped.

    owners: int64 [n], the user of each pair.
    """
    # Pairs in the order of users, so that those of a run are one slice.
    order = np.argsort(owners, kind="stable")
    sorted_owners = owners[order]
    for start, stop in histories.parts(events, events):
        begin, end = np.searchsorted(sorted_owners, [start, stop])
        if end > begin:
            yield slice(start, stop), order[begin:end]
