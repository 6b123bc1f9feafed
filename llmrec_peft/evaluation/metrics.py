"""Metrics of a behaviour classifier, over one set of targets.

One registry, `METRICS`, feeds lookup, result keys, error text, early stopping and the report: a metric is asked for by
the name under which its value comes back ("auc", "ndcg@10", "ece@20").

A metric is planned once for a set of targets and then evaluated for any number of user weightings, so that the value
(all weights 1) and its bootstrap over users (weights drawn) come from the same lines of code.

Arrays: n targets, C classes in the domain's order, U users, S weightings.
Where a metric has no value, such as AUC over targets of one class, the value is NaN.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation import ranking_metrics as ranking
from llmrec_peft.evaluation.targets import Targets, read_targets

ECE_BINS = 15
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

# Weights [S, U] of the users to values [S].
Plan = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One entry of the registry: how a metric is planned, and what is better (None: neither)."""

    summary: str
    higher: bool | None
    plan: Callable[[Targets, int], Plan]
    at: str = ""  # what the number after "@" means; empty: none is taken
    default_at: int | None = None
    needs: str = ""  # "users" or "lists"
    count: bool = False


def compute_metrics(
    labels, probabilities, users=None, lists=None, names: Sequence[str] | None = None
) -> dict[str, float | int]:
    """Values of the named metrics over one set of targets.

    labels: int [n], class numbers. probabilities: float [n, C], class order. users: ids [n], for the user-wise
    metrics. lists: ids [n] of candidate sets, for the ranking metrics. names: keys of `METRICS`, with "@k" where they
    take one; by default `DEFAULT_NAMES`, without gauc where no users are given.
    Counts are int, all other values float, NaN where undefined.
    Raises DataError on bad arrays (`targets.read_targets`), ConfigError on a name that does not exist.
    """
    if names is None:
        names = [name for name in DEFAULT_NAMES if users is not None or METRICS[name].needs != "users"]
    plans = [(name, *find_metric(name)) for name in names]
    targets = read_targets(labels, probabilities, users, lists)
    ones = np.ones((1, targets.num_users))
    values: dict[str, float | int] = {}
    for name, metric, at in plans:
        _check_needs(name, metric, users is not None, lists is not None)
        value = metric.plan(targets, at)(ones)[0]
        values[name] = int(round(value)) if metric.count else float(value)
    return values


def find_metric(name: str) -> tuple[Metric, int]:
    """The registry's entry and the number after "@" (0 where none is taken). Raises ConfigError, listing the names."""
    key, sign, number = str(name).partition("@")
    if key not in METRICS:
        close = difflib.get_close_matches(key, METRICS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "choose one of them"
        raise ConfigError(f"metric '{name}' does not exist, known are {', '.join(metric_names())}: {hint}")
    metric = METRICS[key]
    if not sign and (not metric.at or metric.default_at is not None):
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

    Raises ConfigError for a name that does not exist and for one with no better end, such as po_ratio or a count.
    """
    higher = find_metric(name)[0].higher
    if higher is None:
        able = ", ".join(key for key, metric in METRICS.items() if metric.higher is not None)
        raise ConfigError(f"metric '{name}' has no better end and cannot select a checkpoint: choose one of {able}")
    return higher


def auc(labels, probabilities) -> float:
    """Chance that a positive scores above a negative, ties counted half (midranks); macro one-vs-rest for C > 2."""
    return compute_metrics(labels, probabilities, names=["auc"])["auc"]


def gauc(labels, probabilities, users) -> tuple[float, int, int]:
    """AUC inside each user, averaged with the user's number of targets as weight (Zhu et al., KDD 2017).

    Returns the value, the users that entered it, and the users left out because all their targets are of one class.
    """
    found = compute_metrics(labels, probabilities, users, names=["gauc", "gauc_users", "gauc_excluded_users"])
    return found["gauc"], found["gauc_users"], found["gauc_excluded_users"]


def logloss(labels, probabilities) -> float:
    """Mean of -log p(label), in nats; p is clipped to float64's epsilon."""
    return compute_metrics(labels, probabilities, names=["logloss"])["logloss"]


def ne(labels, probabilities) -> float:
    """Normalised entropy: logloss over the entropy of the observed class shares (He et al., ADKDD 2014)."""
    return compute_metrics(labels, probabilities, names=["ne"])["ne"]


def ece(labels, probabilities, bins: int = ECE_BINS) -> float:
    """Expected calibration error over equal-width bins of [0, 1] (Naeini et al., AAAI 2015).

    Two classes: |mean probability of the last class - its share| in each bin. More: |mean of the largest probability -
    accuracy| (Guo et al., ICML 2017). Bins weigh by their targets.
    """
    return compute_metrics(labels, probabilities, names=[f"ece@{bins}"])[f"ece@{bins}"]


def po_ratio(labels, probabilities) -> float:
    """Mean predicted probability of the last class over its observed share: 1 is right, 2 is twice too high."""
    return compute_metrics(labels, probabilities, names=["po_ratio"])["po_ratio"]


def accuracy(labels, probabilities) -> float:
    """Share of targets whose most probable class is the label; of equal probabilities the first class is taken."""
    return compute_metrics(labels, probabilities, names=["accuracy"])["accuracy"]


def f1(labels, probabilities) -> float:
    """F1 of the last class for two classes, `macro_f1` for more; NaN if it is neither seen nor predicted."""
    return compute_metrics(labels, probabilities, names=["f1"])["f1"]


def macro_f1(labels, probabilities) -> float:
    """Mean of the F1 of each class that is seen or predicted."""
    return compute_metrics(labels, probabilities, names=["macro_f1"])["macro_f1"]


# ---- plans ------------------------------------------------------------------------------------------------------


def _additive(sums: Callable[[Targets, int], np.ndarray], finish: Callable[[np.ndarray], np.ndarray]):
    """A metric that is a function of sums over users: sums gives [U, m], finish takes [S, m] and gives [S]."""

    def plan(targets: Targets, at: int) -> Plan:
        by_user = sums(targets, at)
        return lambda weights: finish(weights @ by_user)

    return plan


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def _sum_by_user(targets: Targets, rows: np.ndarray) -> np.ndarray:
    """[n] or [n, m] to [U, m]."""
    columns = np.reshape(rows, (len(targets.labels), -1)).T
    return np.stack([np.bincount(targets.users, column, targets.num_users) for column in columns], axis=1)


def _nan_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN, NaN where nothing is."""
    seen = ~np.isnan(values)
    return _ratio(np.where(seen, values, 0.0).sum(axis=-1), seen.sum(axis=-1))


def _positive_columns(targets: Targets) -> list[int]:
    """Two classes have one AUC, C classes have C."""
    return [1] if targets.classes == 2 else list(range(targets.classes))


def _plan_auc(targets: Targets, at: int) -> Plan:
    plans = [_plan_binary_auc(targets, column) for column in _positive_columns(targets)]
    return lambda weights: _nan_mean(np.stack([plan(weights) for plan in plans], axis=1))


def _plan_binary_auc(targets: Targets, column: int) -> Plan:
    score = targets.probabilities[:, column]
    order = np.argsort(score, kind="stable")
    score, users = score[order], targets.users[order]
    positive = (targets.labels[order] == column).astype(np.float64)
    starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])

    def values(weights: np.ndarray) -> np.ndarray:
        rows = weights[:, users]
        up = np.add.reduceat(rows * positive, starts, axis=1)
        down = np.add.reduceat(rows, starts, axis=1) - up
        below = np.cumsum(down, axis=1) - down
        return _ratio((up * (below + down / 2)).sum(axis=1), up.sum(axis=1) * down.sum(axis=1))

    return values


def user_aucs(targets: Targets) -> np.ndarray:
    """AUC [U] inside each user, NaN where all targets are of one class; mean over classes for C > 2."""
    per_class = [_user_binary_aucs(targets, column) for column in _positive_columns(targets)]
    return _nan_mean(np.stack(per_class, axis=1))


def _user_binary_aucs(targets: Targets, column: int) -> np.ndarray:
    score = targets.probabilities[:, column]
    order = np.lexsort((score, targets.users))
    score, users = score[order], targets.users[order]
    positive = (targets.labels[order] == column).astype(np.float64)
    starts = np.flatnonzero(np.r_[True, (score[1:] != score[:-1]) | (users[1:] != users[:-1])])
    owner = users[starts]
    up = np.add.reduceat(positive, starts)
    down = np.diff(np.r_[starts, len(score)]) - up
    negatives = np.bincount(owner, down, targets.num_users)
    below = np.cumsum(down) - down - (np.cumsum(negatives) - negatives)[owner]
    wins = np.bincount(owner, up * (below + down / 2), targets.num_users)
    return _ratio(wins, np.bincount(owner, up, targets.num_users) * negatives)


def _gauc_sums(targets: Targets, at: int) -> np.ndarray:
    value, size = user_aucs(targets), np.bincount(targets.users, minlength=targets.num_users)
    used = ~np.isnan(value)
    return np.stack([np.where(used, value * size, 0.0), np.where(used, size, 0.0), used, ~used], axis=1)


def _loss_rows(targets: Targets) -> np.ndarray:
    chosen = targets.probabilities[np.arange(len(targets.labels)), targets.labels]
    tiny = np.finfo(np.float64).eps
    return -np.log(np.clip(chosen, tiny, 1 - tiny))


def _class_rows(targets: Targets) -> np.ndarray:
    return (targets.labels[:, None] == np.arange(targets.classes)).astype(np.float64)


def _loss_sums(targets: Targets, at: int) -> np.ndarray:
    return _sum_by_user(targets, np.column_stack([_loss_rows(targets), _class_rows(targets)]))


def _finish_ne(sums: np.ndarray) -> np.ndarray:
    counts = sums[:, 1:]
    n = counts.sum(axis=1)
    share = counts / n[:, None]
    entropy = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0).sum(axis=1)
    return _ratio(sums[:, 0] / n, entropy)


def calibration_view(targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Stated chance [n] and whether it came true [n], of the last class for C = 2 and of the top class for more."""
    if targets.classes == 2:
        return targets.probabilities[:, 1], (targets.labels == 1).astype(np.float64)
    top = targets.probabilities.argmax(axis=1)
    return targets.probabilities.max(axis=1), (targets.labels == top).astype(np.float64)


def bin_numbers(chance: np.ndarray, bins: int) -> np.ndarray:
    """Equal-width bins of [0, 1]; bin b holds b/bins <= chance < (b+1)/bins, and the last one 1 too."""
    return np.minimum((chance * bins).astype(np.int64), bins - 1)


def _ece_sums(targets: Targets, bins: int) -> np.ndarray:
    chance, came_true = calibration_view(targets)
    cell = targets.users * bins + bin_numbers(chance, bins)
    shape = (targets.num_users, bins)
    gap = np.bincount(cell, chance - came_true, targets.num_users * bins).reshape(shape)
    return np.column_stack([gap, np.bincount(targets.users, minlength=targets.num_users)])


def _po_sums(targets: Targets, at: int) -> np.ndarray:
    last = targets.classes - 1
    return _sum_by_user(targets, np.column_stack([targets.probabilities[:, last], targets.labels == last]))


def _hit_sums(targets: Targets, at: int) -> np.ndarray:
    hit = targets.probabilities.argmax(axis=1) == targets.labels
    return _sum_by_user(targets, np.column_stack([hit, np.ones_like(hit)]))


def _confusion_sums(targets: Targets, at: int) -> np.ndarray:
    """[U, 2C]: for each class twice the true positives, then its labels plus its predictions."""
    seen = _class_rows(targets)
    predicted = (targets.probabilities.argmax(axis=1)[:, None] == np.arange(targets.classes)).astype(np.float64)
    return _sum_by_user(targets, np.column_stack([2 * seen * predicted, seen + predicted]))


def _finish_macro_f1(sums: np.ndarray) -> np.ndarray:
    classes = sums.shape[1] // 2
    return _nan_mean(_ratio(sums[:, :classes], sums[:, classes:]))


def _finish_f1(sums: np.ndarray) -> np.ndarray:
    return _ratio(sums[:, 1], sums[:, 3]) if sums.shape[1] == 4 else _finish_macro_f1(sums)


def _list_sums(value: Callable[[ranking.RankedRows, int], np.ndarray]):
    """Sums by user of a value of each list: [U, 3] of values, lists with something relevant, lists without."""

    def sums(targets: Targets, k: int) -> np.ndarray:
        last = targets.classes - 1
        rows = ranking.rank_rows(targets.probabilities[:, last], targets.labels == last, targets.lists)
        by_list = value(rows, k)
        used = ~np.isnan(by_list)
        owner = np.zeros(len(by_list), dtype=np.int64)
        owner[targets.lists] = targets.users
        columns = [np.where(used, by_list, 0.0), used, ~used]
        return np.stack([np.bincount(owner, column, targets.num_users) for column in columns], axis=1)

    return sums


def _mean_of(sums: Callable[[Targets, int], np.ndarray], top: int = 0, bottom: int = 1):
    return _additive(sums, lambda total: _ratio(total[:, top], total[:, bottom]))


def _pick(sums: Callable[[Targets, int], np.ndarray], column: int):
    return _additive(sums, lambda total: total[:, column])


def _count_sums(targets: Targets, at: int) -> np.ndarray:
    size = np.bincount(targets.users, minlength=targets.num_users)
    return np.stack([size, np.ones_like(size)], axis=1).astype(np.float64)


def _ranked(value: Callable[[ranking.RankedRows, int], np.ndarray], summary: str) -> Metric:
    return Metric(summary, True, _mean_of(_list_sums(value)), at="k", needs="lists")


def _counted(summary: str, sums: Callable[[Targets, int], np.ndarray], column: int, needs: str = "") -> Metric:
    return Metric(summary, None, _pick(sums, column), needs=needs, count=True)


METRICS: dict[str, Metric] = {
    "auc": Metric("area under the ROC curve, macro one-vs-rest for more than two classes", True, _plan_auc),
    "gauc": Metric("AUC inside each user, weighted by targets", True, _mean_of(_gauc_sums), needs="users"),
    "gauc_users": _counted("users in gauc", _gauc_sums, 2, "users"),
    "gauc_excluded_users": _counted("users not in gauc: one class only", _gauc_sums, 3, "users"),
    "logloss": Metric(
        "mean -log p(label), nats", False, _additive(_loss_sums, lambda s: s[:, 0] / s[:, 1:].sum(axis=1))
    ),
    "ne": Metric("logloss over the entropy of the class shares", False, _additive(_loss_sums, _finish_ne)),
    "ece": Metric(
        f"expected calibration error, {ECE_BINS} equal-width bins unless said",
        False,
        _additive(_ece_sums, lambda s: np.abs(s[:, :-1]).sum(axis=1) / s[:, -1]),
        at="bins",
        default_at=ECE_BINS,
    ),
    "po_ratio": Metric("mean predicted over observed share of the last class", None, _mean_of(_po_sums)),
    "accuracy": Metric("share of most probable classes that are right", True, _mean_of(_hit_sums)),
    "f1": Metric("F1 of the last class, macro for more than two classes", True, _additive(_confusion_sums, _finish_f1)),
    "macro_f1": Metric("mean F1 over classes", True, _additive(_confusion_sums, _finish_macro_f1)),
    "ndcg": _ranked(ranking.ndcg, "NDCG over candidate lists, mean of lists"),
    "hr": _ranked(ranking.hit_rate, "chance of a relevant candidate in the first k"),
    "mrr": _ranked(ranking.reciprocal_rank, "mean reciprocal place of the first relevant candidate"),
    "lists": _counted(
        "lists in the ranking metrics", _list_sums(lambda rows, k: ranking.hit_rate(rows, 1)), 1, "lists"
    ),
    "lists_excluded": _counted(
        "lists with nothing relevant", _list_sums(lambda rows, k: ranking.hit_rate(rows, 1)), 2, "lists"
    ),
    "targets": _counted("targets scored", _count_sums, 0),
    "users": _counted("users scored", _count_sums, 1, "users"),
}

HIGHER_IS_BETTER: dict[str, bool | None] = {name: metric.higher for name, metric in METRICS.items()}


# ---- checks -----------------------------------------------------------------------------------------------------


def check_needs(names: Sequence[str], users, lists) -> None:
    """Raise DataError if one of the named metrics needs users or lists that are None."""
    for name in names:
        _check_needs(name, find_metric(name)[0], users is not None, lists is not None)


def _check_needs(name: str, metric: Metric, users: bool, lists: bool) -> None:
    if (metric.needs == "users" and not users) or (metric.needs == "lists" and not lists):
        raise DataError(f"metric '{name}' needs {metric.needs}, got none: pass {metric.needs}=ids, one a target")
