"""AUC over all targets, and inside each user (GAUC).

    AUC  = (pairs with score(positive) > score(negative) + half of the tied pairs) / (positives * negatives)
    GAUC = sum over users of targets(u) * AUC(u) / sum over users of targets(u)

GAUC (Zhu et al., "Optimized cost per click in Taobao display advertising", KDD 2017) leaves out users whose targets are
all of one class. For C > 2 both are macro averages of one class against the rest.
"""

from __future__ import annotations

import numpy as np

from llmrec_peft.evaluation.metric_plans import Floats, Plan, nan_mean, ratio
from llmrec_peft.evaluation.targets import Targets


def plan_auc(targets: Targets, at: int) -> Plan:
    """Plan of AUC, the mean over the columns that have both classes."""
    plans = [_plan_binary_auc(targets, column) for column in _positive_columns(targets)]
    return lambda weights: nan_mean(np.stack([plan(weights) for plan in plans], axis=1))


def user_aucs(targets: Targets) -> Floats:
    """AUC [U] inside each user, NaN where all targets are of one class; mean over classes for C > 2."""
    per_class = [_user_binary_aucs(targets, column) for column in _positive_columns(targets)]
    return nan_mean(np.stack(per_class, axis=1))


def gauc_sums(targets: Targets, at: int) -> Floats:
    """[U, 4]: AUC * targets, targets, whether the user is in GAUC, and whether not."""
    value, size = user_aucs(targets), np.bincount(targets.users, minlength=targets.num_users)
    used = ~np.isnan(value)
    return np.stack([np.where(used, value * size, 0.0), np.where(used, size, 0.0), used, ~used], axis=1)


def _positive_columns(targets: Targets) -> list[int]:
    """Two classes have one AUC, C classes have C."""
    return [1] if targets.classes == 2 else list(range(targets.classes))


def _plan_binary_auc(targets: Targets, column: int) -> Plan:
    """AUC of one class against the rest; a drawn user weighs all of its targets."""
    score = targets.probabilities[:, column]
    order = np.argsort(score, kind="stable")
    score, users = score[order], targets.users[order]
    positive = (targets.labels[order] == column).astype(np.float64)
    starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])  # first row of each tie

    def values(weights: np.ndarray) -> Floats:
        rows = weights[:, users]
        up = np.add.reduceat(rows * positive, starts, axis=1)  # positives of each tie
        down = np.add.reduceat(rows, starts, axis=1) - up
        below = np.cumsum(down, axis=1) - down  # negatives with a lower score
        return ratio((up * (below + down / 2)).sum(axis=1), up.sum(axis=1) * down.sum(axis=1))

    return values


def _user_binary_aucs(targets: Targets, column: int) -> Floats:
    """AUC [U] of one class against the rest inside each user, by one sort of all targets."""
    score = targets.probabilities[:, column]
    order = np.lexsort((score, targets.users))
    score, users = score[order], targets.users[order]
    positive = (targets.labels[order] == column).astype(np.float64)
    starts = np.flatnonzero(np.r_[True, (score[1:] != score[:-1]) | (users[1:] != users[:-1])])
    owner = users[starts]
    up = np.add.reduceat(positive, starts)
    down = np.diff(np.r_[starts, len(score)]) - up
    negatives = np.bincount(owner, down, targets.num_users)
    # Negatives before a tie, less those of all earlier users.
    below = np.cumsum(down) - down - (np.cumsum(negatives) - negatives)[owner]
    wins = np.bincount(owner, up * (below + down / 2), targets.num_users)
    return ratio(wins, np.bincount(owner, up, targets.num_users) * negatives)
