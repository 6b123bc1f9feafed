"""Plans of metrics: a metric prepared for one set of targets, then evaluated for any number of user weightings.

The value of a metric (all weights 1) and its bootstrap over users (weights drawn) thus run the same code.

Shapes: n targets, C classes, U users, S weightings, m sums.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llmrec_peft.evaluation.targets import Targets

Floats = NDArray[np.float64]
Plan = Callable[[np.ndarray], Floats]
"""Takes weights [S, U] of the users and returns values [S]."""
Planner = Callable[[Targets, int], Plan]
"""Prepares a metric for targets; the number is what stands after "@" in the metric's name, 0 for none."""
UserSums = Callable[[Targets, int], np.ndarray]
"""Sums [U, m] of each user, from which an additive metric is computed."""


def additive(sums: UserSums, finish: Callable[[Floats], Floats]) -> Planner:
    """A metric that is a function `finish` ([S, m] -> [S]) of weighted sums over users."""

    def plan(targets: Targets, at: int) -> Plan:
        by_user = sums(targets, at)
        return lambda weights: finish(weights @ by_user)

    return plan


def mean_of(sums: UserSums, top: int = 0, bottom: int = 1) -> Planner:
    """The metric sum[top] / sum[bottom]."""
    return additive(sums, lambda total: ratio(total[:, top], total[:, bottom]))


def sum_of(sums: UserSums, column: int) -> Planner:
    """The metric sum[column], such as a count."""
    return additive(sums, lambda total: total[:, column])


def ratio(top: np.ndarray, bottom: np.ndarray) -> Floats:
    """top / bottom elementwise, NaN where bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def nan_mean(values: np.ndarray) -> Floats:
    """Mean over the last axis of all values that are not NaN; NaN if all are NaN."""
    seen = ~np.isnan(values)
    return ratio(np.where(seen, values, 0.0).sum(axis=-1), seen.sum(axis=-1))


def sum_by_user(targets: Targets, rows: np.ndarray) -> Floats:
    """Sums [U, m] over each user's targets of rows [n] or [n, m]."""
    columns = np.reshape(rows, (len(targets.labels), -1)).T
    return np.stack([np.bincount(targets.users, column, targets.num_users) for column in columns], axis=1)


def count_sums(targets: Targets, at: int) -> Floats:
    """[U, 2]: targets of each user, and 1."""
    size = np.bincount(targets.users, minlength=targets.num_users)
    return np.stack([size, np.ones_like(size)], axis=1).astype(np.float64)
