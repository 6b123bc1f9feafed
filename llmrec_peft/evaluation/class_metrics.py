"""Metrics of the most probable class: accuracy and F1. Of equal probabilities the first class is taken.

accuracy = share of targets whose most probable class is the label
F1(c)    = 2 true positives(c) / (labels(c) + predictions(c))
"""

from __future__ import annotations

import numpy as np

from llmrec_peft.evaluation.metric_plans import Floats, nan_mean, ratio, sum_by_user
from llmrec_peft.evaluation.probability_metrics import label_indicators
from llmrec_peft.evaluation.targets import Targets


def accuracy_sums(targets: Targets, at: int) -> Floats:
    """[U, 2]: right predictions, and targets."""
    hit = targets.probabilities.argmax(axis=1) == targets.labels
    return sum_by_user(targets, np.column_stack([hit, np.ones_like(hit)]))


def confusion_sums(targets: Targets, at: int) -> Floats:
    """[U, 2C]: for each class twice the true positives, then for each class its labels plus its predictions."""
    seen = label_indicators(targets)
    predicted = (targets.probabilities.argmax(axis=1)[:, None] == np.arange(targets.classes)).astype(np.float64)
    return sum_by_user(targets, np.column_stack([2 * seen * predicted, seen + predicted]))


def finish_macro_f1(sums: Floats) -> Floats:
    """Mean F1 [S] over the classes that are seen or predicted, of `confusion_sums` [S, 2C]."""
    classes = sums.shape[1] // 2
    return nan_mean(ratio(sums[:, :classes], sums[:, classes:]))


def finish_f1(sums: Floats) -> Floats:
    """F1 [S] of the last class for C = 2, macro F1 for more, of `confusion_sums` [S, 2C]."""
    return ratio(sums[:, 1], sums[:, 3]) if sums.shape[1] == 4 else finish_macro_f1(sums)
