"""Metrics of a behaviour classifier over one set of targets, by name.

One registry, `METRICS`, feeds lookup, result keys, error text, early stopping and the report: a metric is requested by
the name under which its value is returned ("auc", "ndcg@10", "ece@20"). The formulas are in the modules of each family:
`auc`, `probability_metrics`, `class_metrics` and `ranking_metrics`.

Arrays: n targets, C classes in the domain's order. A metric without a value, such as AUC over targets of one class, is
NaN.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.auc import gauc_sums, plan_auc
from llmrec_peft.evaluation.class_metrics import accuracy_sums, confusion_sums, finish_f1, finish_macro_f1
from llmrec_peft.evaluation.metric_plans import Planner, UserSums, additive, count_sums, mean_of, sum_of
from llmrec_peft.evaluation.probability_metrics import (
    ECE_BINS,
    ece_sums,
    finish_ece,
    finish_logloss,
    finish_ne,
    loss_sums,
    po_ratio_sums,
)
from llmrec_peft.evaluation.ranking_metrics import SetMetric, candidate_set_sums, hit_rate, ndcg, reciprocal_rank
from llmrec_peft.evaluation.targets import read_targets

DEFAULT_NAMES = (
    "auc",
    "gauc",
    "gauc_users",
    "gauc_excluded_users",
    "logloss",
    "ne",
    "ece",
    "po_ratio",
    "accuracy",
    "f1",
    "targets",
)

Needs = Literal["", "users", "candidate_sets"]


@dataclass(frozen=True)
class Metric:
    """One entry of the registry.

    Attributes:
        summary: what the metric is, for the report.
        higher: whether higher is better; None for neither.
        plan: prepares the metric for a set of targets.
        at: meaning of the number after "@" in its name; empty if it takes none.
        default_at: the number where the name has none; None if it must have one.
        needs: the ids that it needs besides labels and probabilities.
        count: whether its value is a whole number.
    """

    summary: str
    higher: bool | None
    plan: Planner
    at: str = ""
    default_at: int | None = None
    needs: Needs = ""
    count: bool = False


def compute_metrics(
    labels: ArrayLike,
    probabilities: ArrayLike,
    users: ArrayLike | None = None,
    candidate_sets: ArrayLike | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, float | int]:
    """Values of the named metrics over one set of targets.

    Args:
        labels: int [n], class numbers.
        probabilities: float [n, C], in class order.
        users: ids [n], for the user-wise metrics.
        candidate_sets: ids [n] of the set that each target competes in, for the ranking metrics.
        names: keys of `METRICS`, with "@k" where they take one; `DEFAULT_NAMES` if not given, without gauc where no
            users are given.

    Returns:
        Counts as int, all other values as float, NaN where undefined.

    Raises DataError on bad arrays (`targets.read_targets`), ConfigError on a name that does not exist.
    """
    if names is None:
        names = [name for name in DEFAULT_NAMES if users is not None or METRICS[name].needs != "users"]
    plans = [(name, *find_metric(name)) for name in names]
    targets = read_targets(labels, probabilities, users, candidate_sets)
    ones = np.ones((1, targets.num_users))
    values: dict[str, float | int] = {}
    for name, metric, at in plans:
        _check_needs(name, metric, users is not None, candidate_sets is not None)
        value = metric.plan(targets, at)(ones)[0]
        values[name] = int(round(value)) if metric.count else float(value)
    return values


def find_metric(name: str) -> tuple[Metric, int]:
    """The registry's entry and the number after "@" (0 where none is taken). Raises ConfigError, listing the names."""
    key, at_sign, number = str(name).partition("@")
    if key not in METRICS:
        close = difflib.get_close_matches(key, METRICS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "choose one of them"
        raise ConfigError(f"metric '{name}' does not exist, known are {', '.join(metric_names())}: {hint}")
    metric = METRICS[key]
    if not at_sign and (not metric.at or metric.default_at is not None):
        return metric, metric.default_at or 0
    if not metric.at:
        raise ConfigError(f"metric '{key}' takes no number, got '{name}': write '{key}'")
    if not number.isascii() or not number.isdigit() or int(number) < 1:
        raise ConfigError(f"metric '{key}' takes {metric.at} >= 1, got '{name}': write for example '{key}@10'")
    return metric, int(number)


def metric_names() -> list[str]:
    """All names of the registry, as they are written in a request."""
    return [f"{key}@{m.at}" if m.at and m.default_at is None else key for key, m in METRICS.items()]


def higher_is_better(name: str) -> bool:
    """Direction of a metric, for early stopping and the choice of a checkpoint.

    Raises ConfigError for a name that does not exist and for one without a direction, such as po_ratio or a count.
    """
    higher = find_metric(name)[0].higher
    if higher is None:
        able = ", ".join(key for key, metric in METRICS.items() if metric.higher is not None)
        raise ConfigError(f"metric '{name}' has no better end and cannot select a checkpoint: choose one of {able}")
    return higher


def check_needs(names: Sequence[str], users: ArrayLike | None, candidate_sets: ArrayLike | None) -> None:
    """Raise DataError if one of the named metrics needs users or candidate sets that are None."""
    for name in names:
        _check_needs(name, find_metric(name)[0], users is not None, candidate_sets is not None)


def _check_needs(name: str, metric: Metric, users: bool, candidate_sets: bool) -> None:
    if (metric.needs == "users" and not users) or (metric.needs == "candidate_sets" and not candidate_sets):
        raise DataError(f"metric '{name}' needs {metric.needs}, got none: pass {metric.needs}=ids, one a target")


# ---- one metric a function --------------------------------------------------------------------------------------


def auc(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties counted half (midranks); macro one-vs-rest for C > 2."""
    return compute_metrics(labels, probabilities, names=["auc"])["auc"]


def gauc(labels: ArrayLike, probabilities: ArrayLike, users: ArrayLike) -> tuple[float, int, int]:
    """AUC inside each user, averaged with the user's number of targets as weight (Zhu et al., KDD 2017).

    Returns the value, the users in it, and the users left out because all their targets are of one class.
    """
    found = compute_metrics(labels, probabilities, users, names=["gauc", "gauc_users", "gauc_excluded_users"])
    return found["gauc"], int(found["gauc_users"]), int(found["gauc_excluded_users"])


def logloss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of -log p(label), in nats; p is clipped to float64's epsilon."""
    return compute_metrics(labels, probabilities, names=["logloss"])["logloss"]


def ne(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Normalised entropy: logloss over the entropy of the observed class shares (He et al., ADKDD 2014)."""
    return compute_metrics(labels, probabilities, names=["ne"])["ne"]


def ece(labels: ArrayLike, probabilities: ArrayLike, bins: int = ECE_BINS) -> float:
    """Expected calibration error over equal-width bins of [0, 1] (Naeini et al., AAAI 2015).

    Two classes: |mean probability of the last class - its share| in each bin. More: |mean of the largest probability -
    accuracy| (Guo et al., ICML 2017). Bins weigh by their targets.
    """
    return compute_metrics(labels, probabilities, names=[f"ece@{bins}"])[f"ece@{bins}"]


def po_ratio(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean predicted probability of the last class over its observed share: 1 is right, 2 is twice too high."""
    return compute_metrics(labels, probabilities, names=["po_ratio"])["po_ratio"]


def accuracy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Share of targets whose most probable class is the label; of equal probabilities the first class is taken."""
    return compute_metrics(labels, probabilities, names=["accuracy"])["accuracy"]


def f1(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """F1 of the last class for two classes, `macro_f1` for more; NaN if it is neither seen nor predicted."""
    return compute_metrics(labels, probabilities, names=["f1"])["f1"]


def macro_f1(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of the F1 of each class that is seen or predicted."""
    return compute_metrics(labels, probabilities, names=["macro_f1"])["macro_f1"]


# ---- registry ---------------------------------------------------------------------------------------------------


def _ranking(value: SetMetric, summary: str) -> Metric:
    return Metric(summary, True, mean_of(candidate_set_sums(value)), at="k", needs="candidate_sets")


def _count(summary: str, sums: UserSums, column: int, needs: Needs = "") -> Metric:
    return Metric(summary, None, sum_of(sums, column), needs=needs, count=True)


_SET_COUNTS = candidate_set_sums(lambda rows, k: hit_rate(rows, 1))

METRICS: dict[str, Metric] = {
    "auc": Metric("area under the ROC curve, macro one-vs-rest for more than two classes", True, plan_auc),
    "gauc": Metric("AUC inside each user, weighted by targets", True, mean_of(gauc_sums), needs="users"),
    "gauc_users": _count("users in gauc", gauc_sums, 2, "users"),
    "gauc_excluded_users": _count("users not in gauc: one class only", gauc_sums, 3, "users"),
    "logloss": Metric("mean -log p(label), nats", False, additive(loss_sums, finish_logloss)),
    "ne": Metric("logloss over the entropy of the class shares", False, additive(loss_sums, finish_ne)),
    "ece": Metric(
        f"expected calibration error, {ECE_BINS} equal-width bins by default",
        False,
        additive(ece_sums, finish_ece),
        at="bins",
        default_at=ECE_BINS,
    ),
    "po_ratio": Metric("mean predicted over observed share of the last class", None, mean_of(po_ratio_sums)),
    "accuracy": Metric("share of most probable classes that are right", True, mean_of(accuracy_sums)),
    "f1": Metric("F1 of the last class, macro for more than two classes", True, additive(confusion_sums, finish_f1)),
    "macro_f1": Metric("mean F1 over classes", True, additive(confusion_sums, finish_macro_f1)),
    "ndcg": _ranking(ndcg, "NDCG over candidate sets, mean of sets"),
    "hr": _ranking(hit_rate, "chance of a relevant candidate in the first k"),
    "mrr": _ranking(reciprocal_rank, "mean reciprocal rank of the first relevant candidate"),
    # Result keys of version 0.1.0, from when a candidate set was called a list.
    "lists": _count("candidate sets in the ranking metrics", _SET_COUNTS, 1, "candidate_sets"),
    "lists_excluded": _count("candidate sets with nothing relevant", _SET_COUNTS, 2, "candidate_sets"),
    "targets": _count("targets scored", count_sums, 0),
    "users": _count("users scored", count_sums, 1, "users"),
}

HIGHER_IS_BETTER: dict[str, bool | None] = {name: metric.higher for name, metric in METRICS.items()}
