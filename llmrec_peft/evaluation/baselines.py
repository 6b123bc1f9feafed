"""Counting baselines: the rates of the item and of the user before the target, and a regression on both.

A model that reads text must beat these on the same targets. In a log split by time, every feature of a target is
counted over rows with a strictly earlier timestamp. So rows of the same second (a page rated at once, a basket) do not
count for each other, and a later row of the test period counts the earlier ones, which the text model sees too. In a
log split by user, times are compared within a user only: the user's rate is counted over the user's strictly earlier
rows, and the item's rate over the training rows of other users, at any time.

    rate = (positives before + STRENGTH * overall rate before) / (rows before + STRENGTH)

The overall rate is smoothed the same way towards 1/2. All is vectorised: one sort for each key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrec_peft.errors import ConfigError, DataError

STRENGTH = 5.0

Floats = NDArray[np.float64]
SplitBy = Literal["time", "user"]


@dataclass(frozen=True)
class PastRates:
    """Smoothed rates and counts over the rows before each row. All arrays are float64 [rows]."""

    item_rate: Floats
    user_rate: Floats
    item_count: Floats
    user_count: Floats

    def features(self, rows: np.ndarray) -> Floats:
        """Inputs [len(rows), 4] of the regression: log-odds of both rates, log(1 + count) of both."""
        rates = np.column_stack([self.item_rate[rows], self.user_rate[rows]])
        counts = np.column_stack([self.item_count[rows], self.user_count[rows]])
        return np.column_stack([np.log(rates) - np.log1p(-rates), np.log1p(counts)])


def rate_baselines(
    user_codes: ArrayLike,
    item_codes: ArrayLike,
    timestamps: ArrayLike,
    labels: ArrayLike,
    train_rows: ArrayLike,
    eval_rows: ArrayLike,
    *,
    by: SplitBy = "time",
) -> dict[str, Floats]:
    """Probability of label 1 for each of `eval_rows`, by counting.

    Args:
        user_codes, item_codes: int [rows].
        timestamps: [rows].
        labels: int [rows], 0 or 1, and -1 for rows without a label, which are not counted.
        train_rows: row numbers that the regression is fitted on.
        eval_rows: row numbers to predict.
        by: how the log was split. "time": the item's rate is counted over all users' earlier rows. "user": over the
            other users' training rows, at any time, since the users of the split must be new. The user's rate is that
            of the user's earlier rows in both.

    Returns {"item_rate": p, "user_rate": p, "both_rates": p}, float64 [len(eval_rows)] each.
    Raises DataError for arrays that do not match, a row to use without a label, or training rows of one class.
    """
    users, items, times, classes = (np.asarray(a) for a in (user_codes, item_codes, timestamps, labels))
    train, held_out = np.asarray(train_rows, dtype=np.int64), np.asarray(eval_rows, dtype=np.int64)
    _check(users, items, times, classes, train, held_out)
    past = past_rates(users, items, times, classes, train_rows=train, by=by)
    return {
        "item_rate": past.item_rate[held_out],
        "user_rate": past.user_rate[held_out],
        "both_rates": _regression(past.features(train), classes[train], past.features(held_out)),
    }


def past_rates(
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray,
    labels: np.ndarray,
    *,
    train_rows: np.ndarray,
    by: SplitBy = "time",
) -> PastRates:
    """Rates and counts before each row; arguments as in `rate_baselines`. Raises ConfigError for another `by`."""
    if by not in ("time", "user"):
        raise ConfigError(f"baselines are counted by 'time' or 'user', got '{by}': pass the domain's split")
    known = labels >= 0
    ones, positive = known.astype(np.float64), (labels == 1).astype(np.float64)
    user_count, user_positive = (_before(users, times, value) for value in (ones, positive))
    if by == "time":
        all_count, all_positive = (_before(np.zeros_like(users), times, value) for value in (ones, positive))
        item_count, item_positive = (_before(items, times, value) for value in (ones, positive))
    else:
        in_train = np.zeros(len(users), dtype=bool)
        in_train[train_rows] = True
        all_count, all_positive = (_of_others(None, users, value * in_train) for value in (ones, positive))
        item_count, item_positive = (_of_others(items, users, value * in_train) for value in (ones, positive))
    # [rows]: the rate of all rows that count for the row.
    overall = (all_positive + STRENGTH / 2) / (all_count + STRENGTH)
    return PastRates(
        item_rate=(item_positive + STRENGTH * overall) / (item_count + STRENGTH),
        user_rate=(user_positive + STRENGTH * overall) / (user_count + STRENGTH),
        item_count=item_count,
        user_count=user_count,
    )


def _before(keys: np.ndarray, times: np.ndarray, values: np.ndarray) -> Floats:
    """Sum [rows] of `values` over rows of the same key with a strictly earlier time."""
    order = np.lexsort((times, keys))  # by key, then time
    key, time = keys[order], times[order]
    new_key = np.r_[True, key[1:] != key[:-1]]
    new_moment = new_key | np.r_[True, time[1:] != time[:-1]]
    # Sum of all sorted rows before each row.
    running = np.r_[0.0, np.cumsum(values[order])[:-1]]
    # Rows of one moment share the sum before its first row.
    moment = running[np.flatnonzero(new_moment)][np.cumsum(new_moment) - 1]
    start = running[np.flatnonzero(new_key)][np.cumsum(new_key) - 1]
    result = np.empty(len(keys))
    result[order] = moment - start
    return result


def _of_others(keys: np.ndarray | None, users: np.ndarray, values: np.ndarray) -> Floats:
    """Sum [rows] of `values` over rows of the same key (None: all rows) and of other users."""
    codes = np.zeros(len(users), dtype=np.int64) if keys is None else np.unique(keys, return_inverse=True)[1]
    total = np.bincount(codes, values)
    owner = np.unique(users, return_inverse=True)[1].astype(np.int64)
    pair = np.unique(owner * len(total) + codes, return_inverse=True)[1]
    # All rows of the key, less those of the row's own user.
    return np.asarray(total[codes] - np.bincount(pair, values)[pair], np.float64)


def _regression(train: Floats, labels: np.ndarray, held_out: Floats) -> Floats:
    """Probability of label 1 of the rows `held_out` [m, 4] by a logistic regression on standardised `train` [n, 4]."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    model = LogisticRegression(max_iter=1000).fit((train - mean) / scale, labels)
    return model.predict_proba((held_out - mean) / scale)[:, 1]


def _check(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, labels: np.ndarray, train: np.ndarray, held_out: np.ndarray
) -> None:
    shapes = [array.shape for array in (users, items, times, labels)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise DataError(f"users, items, timestamps and labels must be [rows] alike, got {shapes}: pass whole columns")
    if not np.isin(labels, (-1, 0, 1)).all():
        found = np.unique(labels)[:5].tolist()
        raise DataError(f"baselines count labels 0 and 1 (-1: none), got {found}: pass one class against the rest")
    for name, rows in (("train_rows", train), ("eval_rows", held_out)):
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(users):
            raise DataError(f"{name} must be row numbers from 0 to {len(users) - 1}, got {rows}: pass the split's rows")
        bare = rows[labels[rows] < 0]
        if len(bare):
            raise DataError(f"{name} must have labels, but {len(bare)} have none: row {bare[0]}: leave them out")
    if len(np.unique(labels[train])) < 2:
        only = int(labels[train][0])
        raise DataError(
            f"the regression needs both labels in train_rows, got only {only}: take a longer training period"
        )
