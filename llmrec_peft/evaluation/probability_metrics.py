"""Metrics of the probabilities themselves: log loss, normalised entropy, calibration error and predicted over observed.

logloss  = mean of -log p(label), in nats
NE       = logloss / (-sum over classes of share(c) log share(c))
ECE      = sum over bins of |sum over the bin's targets of (stated - came true)| / n
po_ratio = mean p(last class) / share(last class)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmrec_peft.evaluation.metric_plans import Floats, ratio, sum_by_user
from llmrec_peft.evaluation.targets import Targets

ECE_BINS = 15


def loss_sums(targets: Targets, at: int) -> Floats:
    """[U, 1 + C]: sum of -log p(label), and targets of each class. p is clipped to float64's epsilon."""
    chosen = targets.probabilities[np.arange(len(targets.labels)), targets.labels]
    tiny = np.finfo(np.float64).eps
    loss = -np.log(np.clip(chosen, tiny, 1 - tiny))
    return sum_by_user(targets, np.column_stack([loss, label_indicators(targets)]))


def label_indicators(targets: Targets) -> Floats:
    """[n, C]: 1.0 in the column of the label."""
    return (targets.labels[:, None] == np.arange(targets.classes)).astype(np.float64)


def finish_logloss(sums: Floats) -> Floats:
    """Logloss [S] of `loss_sums` [S, 1 + C]."""
    return sums[:, 0] / sums[:, 1:].sum(axis=1)


def finish_ne(sums: Floats) -> Floats:
    """Normalised entropy [S] of `loss_sums` [S, 1 + C]; NaN where all targets are of one class."""
    counts = sums[:, 1:]
    n = counts.sum(axis=1)
    share = counts / n[:, None]
    entropy = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0).sum(axis=1)
    return ratio(sums[:, 0] / n, entropy)


def calibration_view(targets: Targets) -> tuple[Floats, Floats]:
    """Stated chance [n] and whether it came true [n]: of the last class for C = 2, of the top class for more."""
    if targets.classes == 2:
        return targets.probabilities[:, 1], (targets.labels == 1).astype(np.float64)
    top = targets.probabilities.argmax(axis=1)
    return targets.probabilities.max(axis=1), (targets.labels == top).astype(np.float64)


def bin_numbers(chance: np.ndarray, bins: int) -> NDArray[np.int64]:
    """Equal-width bins of [0, 1]: bin b has b/bins <= chance < (b+1)/bins, and the last one has 1 too."""
    return np.minimum((chance * bins).astype(np.int64), bins - 1)


def ece_sums(targets: Targets, bins: int) -> Floats:
    """[U, bins + 1]: sum of stated - came true in each bin, and the user's targets."""
    chance, came_true = calibration_view(targets)
    cell = targets.users * bins + bin_numbers(chance, bins)
    shape = (targets.num_users, bins)
    gap = np.bincount(cell, chance - came_true, targets.num_users * bins).reshape(shape)
    return np.column_stack([gap, np.bincount(targets.users, minlength=targets.num_users)])


def finish_ece(sums: Floats) -> Floats:
    """ECE [S] of `ece_sums` [S, bins + 1]; the absolute value is taken after users are summed."""
    return np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]


def po_ratio_sums(targets: Targets, at: int) -> Floats:
    """[U, 2]: sum of p(last class), and labels of the last class."""
    last = targets.classes - 1
    return sum_by_user(targets, np.column_stack([targets.probabilities[:, last], targets.labels == last]))
