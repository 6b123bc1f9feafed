"""Metrics against scikit-learn and against brute force, on predictions with many ties."""

import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation import metrics as m


def predictions(n=400, classes=2, seed=0, steps=12):
    """Labels, probabilities on a coarse grid (so that many tie), and users of 1 to 20 targets."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    raw = rng.integers(1, steps, (n, classes)) + 4.0 * (labels[:, None] == np.arange(classes)) * rng.random(
        (n, 1)
    ).round(1)
    users = np.array([f"user {int(u)}" for u in np.sort(rng.zipf(1.5, n) % 40)])
    return labels, raw / raw.sum(axis=1, keepdims=True), users


def test_two_classes_match_scikit_learn():
    y, p, users = predictions()
    p[:, 1] = p[:, 1].round(1)
    p[:, 0] = 1 - p[:, 1]
    assert len(np.unique(p[:, 1])) < 20
    found = m.compute_metrics(y, p, users)
    assert list(found) == list(m.DEFAULT_NAMES)
    assert found["auc"] == pytest.approx(roc_auc_score(y, p[:, 1]), abs=1e-12)
    assert found["logloss"] == pytest.approx(log_loss(y, p), abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy_score(y, p[:, 1] > 0.5), abs=1e-12)
    assert found["f1"] == pytest.approx(f1_score(y, p[:, 1] > 0.5), abs=1e-12)
    share = y.mean()
    entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert found["ne"] == pytest.approx(log_loss(y, p) / entropy, abs=1e-12)
    assert found["po_ratio"] == pytest.approx(p[:, 1].mean() / share, abs=1e-12)
    assert found["targets"] == 400 and isinstance(found["targets"], int)


def test_many_classes_match_scikit_learn():
    y, p, users = predictions(classes=5)
    found = m.compute_metrics(y, p, users, names=["auc", "logloss", "accuracy", "f1", "macro_f1"])
    assert found["auc"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"), abs=1e-12)
    assert found["logloss"] == pytest.approx(log_loss(y, p, labels=range(5)), abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(1)), abs=1e-12)
    assert found["macro_f1"] == found["f1"] == pytest.approx(f1_score(y, p.argmax(1), average="macro"), abs=1e-12)


def test_a_class_nobody_took_leaves_the_macro_averages():
    y, p, _ = predictions(classes=3)
    wide = np.column_stack([p[:, :2], np.zeros(len(y)), p[:, 2]])
    y = np.where(y == 2, 3, y)
    assert m.auc(y, wide) == pytest.approx(np.mean([roc_auc_score(y == c, wide[:, c]) for c in (0, 1, 3)]), abs=1e-12)
    assert m.macro_f1(y, wide) == pytest.approx(f1_score(y, wide.argmax(1), average="macro"), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_gauc_is_the_weighted_mean_over_users_with_two_classes(classes):
    y, p, users = predictions(classes=classes, seed=3)
    total, weight, excluded = 0.0, 0, 0
    for user in np.unique(users):
        rows = users == user
        of_class = [
            roc_auc_score(y[rows] == c, p[rows, c])
            for c in ([1] if classes == 2 else range(classes))
            if 0 < (y[rows] == c).sum() < rows.sum()
        ]
        if of_class:
            total += rows.sum() * np.mean(of_class)
            weight += rows.sum()
        else:
            excluded += 1
    value, used, left_out = m.gauc(y, p, users)
    assert excluded > 0
    assert (used, left_out) == (len(np.unique(users)) - excluded, excluded)
    assert value == pytest.approx(total / weight, abs=1e-12)


def test_gauc_does_not_depend_on_the_order_of_rows_or_the_type_of_ids():
    y, p, users = predictions(seed=4)
    order = np.random.default_rng(0).permutation(len(y))
    codes = np.unique(users, return_inverse=True)[1]
    assert m.gauc(y, p, users) == pytest.approx(m.gauc(y[order], p[order], codes[order]), abs=1e-12)
    assert m.gauc(y, p, users.astype(object)) == m.gauc(y, p, list(users))


def test_one_class_only_is_nan_and_the_rest_stands():
    p = np.array([[0.2, 0.8], [0.4, 0.6]])
    found = m.compute_metrics([1, 1], p, ["a", "b"])
    assert {name for name, value in found.items() if math.isnan(value)} == {"auc", "gauc", "ne"}
    assert (found["gauc_users"], found["gauc_excluded_users"]) == (0, 2)
    assert found["logloss"] == pytest.approx(-math.log(0.8 * 0.6) / 2)
    assert math.isnan(m.po_ratio([0, 0], p))
    assert math.isnan(m.f1([0, 0], p[:, ::-1]))
    assert m.f1([1, 1], p[:, ::-1]) == 0.0


def test_ece_of_a_hand_worked_case_and_at_the_edges():
    p1 = np.array([0.0, 0.05, 0.1, 0.15, 0.95, 1.0])
    y = [0, 1, 0, 0, 1, 0]
    # Ten bins: {0, .05} gap |.05 - 1|, {.1, .15} gap .25, {.95, 1} gap |1.95 - 1|; sums over 6 targets.
    assert m.ece(y, np.column_stack([1 - p1, p1]), bins=10) == pytest.approx((0.95 + 0.25 + 0.95) / 6)
    assert m.compute_metrics(y, np.column_stack([1 - p1, p1]), names=["ece@1"])["ece@1"] == pytest.approx(
        abs(2.25 - 2) / 6
    )


def test_ece_of_many_classes_looks_at_the_top_class():
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    assert m.ece([0, 2], p, bins=1) == pytest.approx(abs((0.6 + 0.7) / 2 - 0.5))


def test_logloss_is_finite_for_a_certain_error():
    assert m.logloss([1, 0], [[1.0, 0.0], [1.0, 0.0]]) == pytest.approx(-math.log(np.finfo(float).eps) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "probabilities", "users", "message"),
    [
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], None, "must be finite, but 1 of 2 rows do not: row 1 is"),
        ([0, 1], [[0.5, 0.5], [np.inf, 0.5]], None, "must be finite"),
        ([0, 1], [[0.5, 0.5], [2.0, -1.0]], None, "sum to 1 in each row, but 1 of 2"),
        ([0, 1], [[0.5, 0.5], [0.9, 0.9]], None, "pass softmax, not logits"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], None, "whole numbers from 0 to 1, but 1 of 2 rows do not: row 1 is 2"),
        ([0, -1], [[0.5, 0.5], [0.5, 0.5]], None, "row 1 is -1"),
        ([0, np.nan], [[0.5, 0.5], [0.5, 0.5]], None, "row 1 is nan"),
        ([0, 0.5], [[0.5, 0.5], [0.5, 0.5]], None, "row 1 is 0.5"),
        (["yes", "no"], [[0.5, 0.5], [0.5, 0.5]], None, "map names to numbers"),
        ([0], [[0.5, 0.5], [0.5, 0.5]], None, r"labels must be \[2\]"),
        ([0, 1], [0.5, 0.5], None, r"got shape \(2,\)"),
        ([], np.zeros((0, 2)), None, "at least one target, got 0"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], ["a"], r"users must be \[2\]"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], np.array(["a", None], dtype=object), "users must not be null, but 1 of 2"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], [1.0, np.nan], "users must not be null"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], pd.array([1, None], "Int64"), "users must not be null, but 1 of 2"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], pd.Series(["a", pd.NA], dtype=object), "users must not be null, but 1 of 2"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], np.array(["a", 1], dtype=object), "users must be of one type"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(labels, probabilities, users, message):
    with pytest.raises(DataError, match=message) as caught:
        m.compute_metrics(labels, probabilities, users, names=["accuracy"])
    assert "\n" not in str(caught.value)


def test_names_are_looked_up_in_one_registry():
    y, p, users = predictions(n=50)
    assert list(m.compute_metrics(y, p, users, names=["ece@7", "auc"])) == ["ece@7", "auc"]
    assert "gauc" not in m.compute_metrics(y, p)
    with pytest.raises(ConfigError, match="'aucc' does not exist, known are auc, gauc.*ndcg@k.*did you mean 'auc'"):
        m.compute_metrics(y, p, names=["aucc"])
    with pytest.raises(ConfigError, match="'ndcg' takes k >= 1, got 'ndcg'"):
        m.find_metric("ndcg")
    with pytest.raises(ConfigError, match="got 'ndcg@0'"):
        m.find_metric("ndcg@0")
    with pytest.raises(ConfigError, match="'auc' takes no number, got 'auc@3'"):
        m.find_metric("auc@3")
    with pytest.raises(DataError, match="'gauc' needs users, got none"):
        m.compute_metrics(y, p, names=["gauc"])
    with pytest.raises(DataError, match="'ndcg@3' needs candidate_sets, got none"):
        m.compute_metrics(y, p, users, names=["ndcg@3"])


def test_direction_of_each_metric():
    up = {name for name, higher in m.HIGHER_IS_BETTER.items() if higher}
    down = {name for name, higher in m.HIGHER_IS_BETTER.items() if higher is False}
    assert up == {"auc", "gauc", "accuracy", "f1", "macro_f1", "ndcg", "hr", "mrr"}
    assert down == {"logloss", "ne", "ece"}
    assert m.higher_is_better("ndcg@10") is True and m.higher_is_better("logloss") is False
    with pytest.raises(ConfigError, match="'po_ratio' has no better end"):
        m.higher_is_better("po_ratio")
