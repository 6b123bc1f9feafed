"""The events of one split: the rows of the log that its windows can hold, as targets or as history."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import LogSplit
from llmrec_peft.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Events:
    """Events of one split, in the log's order: by user, then by time.

    Four index spaces meet in streams:

    - R, rows of the log;
    - E, events: the rows that a window can hold. `rows` maps E to R;
    - P, target events: the events that are predicted. `targets` maps P to E;
    - T, targets: each target event followed by its sampled negatives; `StreamDataset` numbers them.

    Attributes:
        rows: int64 [E], row of the log of each event, rising.
        classes: int64 [E], class number; -1 without a label.
        is_target: bool [E].
        in_history: bool [E], whether the event and its outcome are part of the prefix that later events see.
        moment: int64 [E], the first event of the same user and moment; with `simultaneous: order` the event itself.
    """

    rows: np.ndarray
    classes: np.ndarray
    is_target: np.ndarray
    in_history: np.ndarray
    moment: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def targets(self) -> np.ndarray:
        """int64 [P], the events that are predicted, rising."""
        return np.flatnonzero(self.is_target)

    @cached_property
    def on_prefix(self) -> np.ndarray:
        """bool [E]: whether an event is predicted on the prefix, since it is alone at its moment, or as a candidate."""
        return self.in_history & (np.bincount(self.moment, minlength=len(self))[self.moment] == 1)


def select_events(split: LogSplit, domain: Domain, row_classes: np.ndarray, *, unlabelled: bool) -> Events:
    """Select the events of a split.

    Args:
        split: its rows are the targets; earlier rows of the same users are history.
        domain: rules for duplicates, history and simultaneous events.
        row_classes: int [R], `domain.classes(log)`; rows of class -1 are left out.
        unlabelled: make rows of the split targets although their class is -1.

    Raises:
        DataError: no row of the split is left.
    """
    log = split.log
    selected = row_classes >= 0
    if unlabelled:
        selected[split.rows] = True
    selected[_duplicate_rows(split, domain)] = False
    # A window holds nothing after the moment of its user's last target.
    last = np.full(log.num_users, -np.inf)
    np.maximum.at(last, log.user_codes[split.rows], log.timestamps[split.rows])
    rows = np.flatnonzero(selected & (log.timestamps <= last[log.user_codes]))
    classes = row_classes[rows].astype(np.int64)
    is_target = np.zeros(len(log), bool)  # [R]
    is_target[split.rows] = True
    if not is_target[rows].any():
        raise DataError(f"split '{split.name}' of {log.name} has no labelled target; give more data or shares")
    wanted = domain.stream.history_labels
    class_in_history = np.array([wanted is None or label in wanted for label in domain.labels])  # [classes]
    in_history = class_in_history[classes] & (classes >= 0)
    return Events(rows, classes, is_target[rows], in_history, _moments(split, domain, rows))


def _moments(split: LogSplit, domain: Domain, rows: np.ndarray) -> np.ndarray:
    """First event of each event's moment, int64 [E]."""
    numbers = np.arange(len(rows))
    if domain.simultaneous == "order":
        return numbers
    users, times = split.log.user_codes[rows], split.log.timestamps[rows]
    new = np.ones(len(rows), bool)
    new[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
    return np.maximum.accumulate(np.where(new, numbers, 0))


def _duplicate_rows(split: LogSplit, domain: Domain) -> np.ndarray:
    """Rows of the log that the domain's `duplicates` leaves out, int64; logs a warning that counts them."""
    log = split.log
    found = log.duplicates
    if not len(found.rows):
        return found.rows
    classes = domain.row_labels(log)
    surplus = found.surplus(classes, log.context_only)
    own = int(np.isin(surplus, split.rows, assume_unique=True).sum())
    drops = domain.duplicates == "drop"
    if own and (drops or domain.simultaneous == "order"):
        _log.warning(
            "%s of log %r: %d rows (%d in the whole log) repeat the user, item and moment of another row, %d such "
            "events of the log with different labels; %s",
            split.name, log.name, own, len(surplus), found.conflicts(classes),
            "one row of each stays, the last with a label (duplicates: drop)" if drops else
            "they see its outcome in the history; set duplicates: drop in the domain",
        )  # fmt: skip
    return surplus if drops else surplus[:0]
