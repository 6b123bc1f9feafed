"""Candidate sets: each positive of a split among other items of the catalogue."""

from functools import cached_property
from typing import Any

import numpy as np

from llmrec_peft.config.schema import RankingConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import Splits
from llmrec_peft.errors import DataError
from llmrec_peft.requests.request import Event
from llmrec_peft.retrieval.histories import Histories, feedback
from llmrec_peft.retrieval.popularity import Popularity, choose_half_life
from llmrec_peft.retrieval.recommender import excluded_labels
from llmrec_peft.runs.logged_events import LoggedEvents


class CandidateSets:
    """Positives of one split, and the set of items in which each is ranked.

    A target is a positive that could have been recommended: its user had no earlier label of `recommend.exclude` for
    the item. The candidate set of a target is its own item and other items of the catalogue: none that an earlier label
    excludes, and none with a positive at the same moment, which would be as correct. Later rows do not matter.

    Attributes:
        rows: int64 [n], rows of the log that are targets, ascending.
        left_out: number of positives that are not targets, by reason.
    """

    def __init__(self, splits: Splits, name: str, domain: Domain, options: RankingConfig) -> None:
        """Draw the targets of split `name`.

        Raises:
            DataError: no positive that can be ranked.
        """
        self.log, self.domain, self.options, self.name = splits.train.log, domain, options, name
        self.splits = splits
        self.size = None if options.candidates == "all" else options.candidates  # None: the whole catalogue
        self.logged, self.feedback = LoggedEvents(self.log, domain), feedback(self.log, domain)
        excluded = [domain.labels.index(label) for label in excluded_labels(domain)]
        self._excluding = np.isin(self.logged.classes, excluded)
        taken = splits[name].rows
        taken = taken[self.feedback[taken] == 1]
        if not len(taken):
            raise DataError(
                f"{name} of log {self.log.name!r} has no positive, so there is nothing to rank; give more data, or "
                "leave ranking out"
            )
        once = self._each_once(taken)
        again = self._excluded_before(once)
        drawn = np.random.default_rng(options.seed).permutation(once[~again])[: options.targets]
        alone = np.array([not len(self.other_items(int(row))) for row in drawn], bool)
        self.rows = np.sort(drawn[~alone])
        self.left_out = {
            "met before": int(again.sum()),
            "named twice at a moment": len(taken) - len(once),
            "no other item left": int(alone.sum()),
        }
        if not len(self.rows):
            raise DataError(
                f"none of the {len(taken)} positives in {name} of log {self.log.name!r} can be ranked: "
                + ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
                + "; correct recommend.exclude of the domain, or leave ranking out"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def users(self) -> np.ndarray:
        """User code of each target, [n]."""
        return self.log.user_codes[self.rows]

    @cached_property
    def popularity(self) -> Popularity:
        """Popularity of the items in the training rows."""
        rows = self.splits.train.rows
        timed = self.domain.split.by == "time" and self.log.dated
        return Popularity(choose_half_life(self.log, rows, self.feedback) if timed else None).fit(
            self.log, rows, self.feedback
        )

    @cached_property
    def _counts(self) -> np.ndarray:
        """Training positives of each item, int64 [items]."""
        rows = self.splits.train.rows
        return np.bincount(self.log.item_codes[rows[self.feedback[rows] == 1]], minlength=self.log.num_items)

    def _keys(self, rows: np.ndarray) -> np.ndarray:
        """One number for each pair of user and item, int64 [rows]."""
        return self.log.user_codes[rows].astype(np.int64) * self.log.num_items + self.log.item_codes[rows]

    def _each_once(self, rows: np.ndarray) -> np.ndarray:
        """The first of the rows with equal user, item and moment, ascending."""
        keys, times = self._keys(rows), self.log.timestamps[rows]
        order = np.lexsort((rows, times, keys))
        same = (np.diff(keys[order]) == 0) & (np.diff(times[order]) == 0)
        return np.sort(rows[order[np.r_[True, ~same]]])

    def _excluded_before(self, rows: np.ndarray) -> np.ndarray:
        """Whether the user had an excluding label for the item strictly before, bool [rows]."""
        times, done = self.log.timestamps, np.flatnonzero(self._excluding)
        keys = self._keys(done)
        order = np.lexsort((times[done], keys))
        known, first = np.unique(keys[order], return_index=True)
        if not len(known):
            return np.zeros(len(rows), bool)
        wanted = self._keys(rows)
        # `known` is sorted; `first` leads from a pair to its earliest excluding row, in the order of `order`.
        found = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return (known[found] == wanted) & (times[done[order[first[found]]]] < times[rows])

    def excluded_items(self, row: int) -> np.ndarray:
        """Item codes that must not be in the candidate set of the target in `row`, int64."""
        user = self.log.user_codes[row]
        own = slice(self.log.user_offsets[user], self.log.user_offsets[user + 1])
        times, moment = self.log.timestamps[own], self.log.timestamps[row]
        gone = (self._excluding[own] & (times < moment)) | ((self.feedback[own] == 1) & (times == moment))
        items = np.unique(self.log.item_codes[own][gone])
        return items[items != self.log.item_codes[row]].astype(np.int64)

    def other_items(self, row: int) -> np.ndarray:
        """Item codes that the target's own item can be ranked against, ascending."""
        allowed = np.ones(self.log.num_items, bool)
        allowed[self.excluded_items(row)] = False
        allowed[self.log.item_codes[row]] = False
        return np.flatnonzero(allowed)

    def candidates(self, row: int) -> np.ndarray:
        """Item codes of the target's candidate set, int64, its own item first.

        The draw depends on the seed and the row only, so that it is the same whichever other targets are ranked.
        """
        others, size = self.other_items(row), self.size
        if size is not None and len(others) > size - 1:
            # Gumbel top-k: the highest of log(weight) + Gumbel noise are a sample without replacement by weight. Items
            # without a training positive get a tiny weight, so that they are drawn only after all others.
            weights = self._counts[others] if self.options.sampling == "popularity" else np.ones(len(others))
            keys = np.log(np.maximum(weights, 1e-300))
            keys += np.random.default_rng([self.options.seed, row]).gumbel(size=len(others))
            others = np.sort(others[np.argpartition(-keys, size - 2)[: size - 1]])
        return np.concatenate([[self.log.item_codes[row]], others]).astype(np.int64)

    def request(self, row: int, codes: np.ndarray) -> tuple[list[tuple[Event, str]], list[Event], dict[str, Any]]:
        """A request to a scorer: the target's history, candidates at its moment, and the columns of the header."""
        user, logged = int(self.log.user_codes[row]), self.logged
        moments = logged.moments(np.array([row])) * len(codes)
        header = {name: logged.first(user, name) for name in self.domain.header_columns}
        return logged.history(user, self.log.timestamps[row]), logged.events(codes, moments), header

    def histories(self, rows: np.ndarray) -> Histories:
        """Histories of the users of targets, strictly before each target."""
        return Histories.before(self.log, self.feedback, self.log.user_codes[rows], self.log.timestamps[rows])
