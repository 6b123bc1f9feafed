"""The bootstrap equals a plain one that copies rows, covers what it should, and is paired."""

import numpy as np
import pytest

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation import bootstrap
from llmrec_peft.evaluation.metrics import METRICS, compute_metrics
from llmrec_peft.evaluation.targets import read_targets

NAMES = ["auc", "gauc", "logloss", "ne", "ece", "po_ratio", "accuracy", "f1", "macro_f1", "ndcg@3", "hr@1", "mrr@5"]


def interval(metric, *arrays, **options):
    return bootstrap.intervals([metric], *arrays, **options)[metric]


def predictions(users=25, seed=0, classes=2):
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(users), rng.integers(2, 15, users))
    labels = rng.integers(0, classes, len(who))
    raw = rng.integers(1, 9, (len(who), classes)) + 3.0 * (labels[:, None] == np.arange(classes))
    return labels, raw / raw.sum(axis=1, keepdims=True), who, who * 2 + rng.integers(0, 2, len(who))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_weighted_user_is_a_copied_user(classes):
    """Each metric's value under weights is its value on a table in which drawn users stand as often as drawn."""
    labels, p, who, sets = predictions(classes=classes)
    weights = bootstrap._weights(np.random.default_rng(7), 25, 6)
    assert weights.sum(axis=1).tolist() == [25.0] * 6 and weights.max() > 1
    targets = read_targets(labels, p, who, sets)
    for name in [*NAMES, *(key for key, metric in METRICS.items() if metric.count)]:
        metric, at = METRICS[name.split("@")[0]], int((name.split("@") + ["15"])[1])
        values = metric.plan(targets, at)(weights)
        for weight, value in zip(weights, values, strict=True):
            rows = [np.flatnonzero(who == u) for u in range(25) for _ in range(int(weight[u]))]
            copy = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
            take = np.concatenate(rows)
            plain = compute_metrics(labels[take], p[take], copy, copy * 1000 + sets[take], names=[name])
            assert value == pytest.approx(plain[name], abs=1e-12), name


def test_intervals_hold_the_value_and_depend_on_the_seed_alone():
    labels, p, who, sets = predictions()
    found = bootstrap.intervals(NAMES, labels, p, who, sets, samples=200, seed=3)
    plain = compute_metrics(labels, p, who, sets, names=NAMES)
    for name in NAMES:
        assert found[name].value == pytest.approx(plain[name], abs=1e-12)
        assert found[name].low < found[name].high
    assert found == bootstrap.intervals(NAMES, labels, p, who, sets, samples=200, seed=3)
    assert found != bootstrap.intervals(NAMES, labels, p, who, sets, samples=200, seed=4)
    assert found["auc"] == interval("auc", labels, p, who, samples=200, seed=3)
    wide = interval("auc", labels, p, who, samples=200, seed=3, level=0.5)
    assert found["auc"].low < wide.low < wide.high < found["auc"].high


def test_chunks_do_not_change_the_draws(monkeypatch):
    labels, p, who, _ = predictions()
    whole = bootstrap.intervals(["auc", "logloss"], labels, p, who, samples=50)
    monkeypatch.setattr(bootstrap, "CHUNK_NUMBERS", 7 * len(labels))
    parts = bootstrap.intervals(["auc", "logloss"], labels, p, who, samples=50)
    for name in whole:
        assert (parts[name].low, parts[name].high) == pytest.approx((whole[name].low, whole[name].high), abs=1e-12)


def test_targets_of_one_user_are_not_counted_as_independent():
    """Each of 30 users repeats one answer 20 times: the interval must be about as wide as 30 targets give."""
    rng = np.random.default_rng(1)
    label, chance = rng.integers(0, 2, 30), rng.uniform(0.05, 0.95, 30)
    rows = np.repeat(np.arange(30), 20)
    p = np.column_stack([1 - chance, chance])
    by_user = interval("logloss", label[rows], p[rows], rows)
    single = interval("logloss", label, p, np.arange(30))
    as_if_independent = interval("logloss", label[rows], p[rows], np.arange(600))
    assert by_user.high - by_user.low == pytest.approx(single.high - single.low, rel=1e-9)
    assert by_user.high - by_user.low > 3 * (as_if_independent.high - as_if_independent.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Accuracy is .7 by construction; of 200 tables, the 90 % interval must hold it in 82 to 97 %."""
    rng = np.random.default_rng(11)
    p = np.tile([0.4, 0.6], (300, 1))
    users = np.repeat(np.arange(60), 5)
    hits = 0
    for seed in range(200):
        found = interval("accuracy", (rng.random(300) < 0.7).astype(int), p, users, samples=150, seed=seed, level=0.9)
        hits += found.low <= 0.7 <= found.high
    assert 164 <= hits <= 194


def test_a_difference_is_paired():
    labels, p, who, _ = predictions(users=40)
    worse = 0.9 * p + 0.1 * p[:, ::-1]
    found = bootstrap.differences(["logloss", "accuracy"], labels, worse, p, who, samples=300)
    value = (
        compute_metrics(labels, p, names=["logloss"])["logloss"]
        - compute_metrics(labels, worse, names=["logloss"])["logloss"]
    )
    assert found["logloss"].value == pytest.approx(value, abs=1e-12)
    assert found["logloss"].high < 0
    single = interval("logloss", labels, p, who, samples=300)
    assert found["logloss"].high - found["logloss"].low < (single.high - single.low) / 2
    same = bootstrap.differences(["auc"], labels, p, p, who, samples=20)["auc"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_samples_without_a_value_are_counted():
    p = np.array([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])
    found = interval("auc", [1, 0, 0], p, ["a", "b", "c"], samples=400)
    assert 0 < found.undefined < 400 and found.value == 1.0
    none = interval("auc", [1, 1, 1], p, ["a", "b", "c"], samples=10)
    assert none.undefined == 10 and np.isnan([none.value, none.low, none.high]).all()


def test_one_user_has_no_interval():
    labels, p, _, _ = predictions()
    found = bootstrap.intervals(["auc", "logloss"], labels, p, ["one"] * len(labels), samples=30)
    for name, interval in found.items():
        assert interval.value == compute_metrics(labels, p, names=[name])[name]
        assert np.isnan([interval.low, interval.high]).all() and interval.undefined == 30


def test_bad_requests_are_refused():
    labels, p, who, _ = predictions()
    with pytest.raises(ConfigError, match="samples >= 1 and 0 < level < 1, got 0 and 0.95"):
        interval("auc", labels, p, who, samples=0)
    with pytest.raises(ConfigError, match="'acu' does not exist"):
        interval("acu", labels, p, who)
    with pytest.raises(DataError, match="the bootstrap draws users, got none"):
        interval("auc", labels, p, None)
    with pytest.raises(DataError, match="'hr@1' needs candidate_sets, got none"):
        interval("hr@1", labels, p, who)


def test_a_mean_draws_users_as_metrics_do():
    labels, p, who, _ = predictions()
    hits = (p.argmax(axis=1) == labels).astype(float)
    found = bootstrap.mean_interval(hits, who, samples=200, seed=3)
    wanted = interval("accuracy", labels, p, who, samples=200, seed=3)
    assert found.to_dict() == pytest.approx(wanted.to_dict(), abs=1e-12)
    alone = bootstrap.mean_interval(hits, who, samples=0)
    assert alone.value == hits.mean() and np.isnan([alone.low, alone.high]).all() and alone.undefined == 0
    one = bootstrap.mean_interval(hits, ["one"] * len(hits), samples=30)
    assert one.value == hits.mean() and np.isnan([one.low, one.high]).all() and one.undefined == 30
    with pytest.raises(DataError, match="a mean needs values"):
        bootstrap.mean_interval([], [])
    with pytest.raises(DataError, match="a mean needs values"):
        bootstrap.mean_interval([1.0, 2.0], ["a"])
    with pytest.raises(ConfigError, match="samples >= 0"):
        bootstrap.mean_interval([1.0], ["a"], samples=-1)
