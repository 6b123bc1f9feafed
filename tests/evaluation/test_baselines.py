"""Rates against a plain loop, and no row of the present or the future in any of them."""

import numpy as np
import pytest

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.baselines import STRENGTH, past_rates, rate_baselines
from llmrec_peft.evaluation.metrics import auc


def table(rows=300, seed=0):
    """A log whose users and items each have a taste of their own; times repeat often."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 25, rows), rng.integers(0, 15, rows)
    times = rng.integers(0, rows // 3, rows)
    odds = rng.normal(0, 1.5, 25)[users] + rng.normal(0, 1.5, 15)[items]
    return users, items, times, (rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(int)


def smoothed(labels, rows, overall):
    return ((labels[rows] == 1).sum() + STRENGTH * overall) / ((labels[rows] >= 0)[:].sum() + STRENGTH)


def test_rates_equal_a_loop_over_strictly_earlier_rows():
    users, items, times, labels = table()
    labels[::7] = -1
    past = past_rates(users, items, times, labels, train_rows=np.arange(100))
    for row in range(len(users)):
        before = times < times[row]
        overall = smoothed(labels, before, 0.5)
        assert past.item_rate[row] == pytest.approx(
            smoothed(labels, before & (items == items[row]), overall), abs=1e-12
        )
        assert past.user_rate[row] == pytest.approx(
            smoothed(labels, before & (users == users[row]), overall), abs=1e-12
        )
        assert past.user_count[row] == (before & (users == users[row]) & (labels >= 0)).sum()


def test_by_user_the_items_rate_comes_from_other_users_training_rows():
    users, items, times, labels = table(seed=1)
    train = np.flatnonzero(users < 18)
    past = past_rates(users, items, times, labels, train_rows=train, by="user")
    for row in range(len(users)):
        others = (users < 18) & (users != users[row])
        overall = smoothed(labels, others, 0.5)
        assert past.item_rate[row] == pytest.approx(
            smoothed(labels, others & (items == items[row]), overall), abs=1e-12
        )
        own = (times < times[row]) & (users == users[row])
        assert past.user_rate[row] == pytest.approx(smoothed(labels, own, overall), abs=1e-12)


def test_a_target_never_sees_its_own_label_or_a_later_one():
    users, items, times, labels = table(seed=2)
    train, held = np.flatnonzero(times < 80), np.flatnonzero(times >= 80)
    first = rate_baselines(users, items, times, labels, train, held)
    moment = np.flatnonzero(times == times.max())
    changed = labels.copy()
    changed[moment] = 1 - changed[moment]
    second = rate_baselines(users, items, times, changed, train, held)
    for name in first:
        assert (first[name] == second[name]).all(), name
    changed = labels.copy()
    changed[held] = 1 - changed[held]
    earliest = times[held] == times[held].min()
    flipped = rate_baselines(users, items, times, changed, train, held)
    assert all((first[name][earliest] == flipped[name][earliest]).all() for name in first)
    assert not (first["item_rate"] == flipped["item_rate"]).all()


@pytest.mark.parametrize("by", ["time", "user"])
def test_both_rates_beat_each_one(by):
    users, items, times, labels = table(rows=6000, seed=3)
    split = times < 1600 if by == "time" else users < 18
    train, held = np.flatnonzero(split), np.flatnonzero(~split)
    found = rate_baselines(users, items, times, labels, train, held, by=by)
    score = {name: auc(labels[held], np.column_stack([1 - p, p])) for name, p in found.items()}
    assert list(score) == ["item_rate", "user_rate", "both_rates"]
    assert 0.6 < max(score["item_rate"], score["user_rate"]) < score["both_rates"]


def test_order_of_rows_does_not_matter():
    users, items, times, labels = table(seed=4)
    order = np.random.default_rng(0).permutation(len(users))
    place = np.argsort(order)
    plain = rate_baselines(users, items, times, labels, np.arange(200), np.arange(200, 300))
    mixed = rate_baselines(
        users[order], items[order], times[order], labels[order], place[np.arange(200)], place[np.arange(200, 300)]
    )
    assert all(plain[name] == pytest.approx(mixed[name], abs=1e-6) for name in plain)


def test_bad_input_is_refused():
    users, items, times, labels = table()
    rows = np.arange(10)
    with pytest.raises(DataError, match=r"alike, got \[\(300,\), \(3,\)"):
        rate_baselines(users, items[:3], times, labels, rows, rows)
    with pytest.raises(DataError, match=r"labels 0 and 1 \(-1: none\), got \[0, 2\]"):
        rate_baselines(users, items, times, labels * 2, rows, rows)
    with pytest.raises(DataError, match="eval_rows must be row numbers from 0 to 299"):
        rate_baselines(users, items, times, labels, rows, [300])
    with pytest.raises(DataError, match="train_rows must be row numbers"):
        rate_baselines(users, items, times, labels, [], rows)
    with pytest.raises(DataError, match="eval_rows must have labels, but 1 have none: row 5"):
        rate_baselines(users, items, times, np.where(np.arange(300) == 5, -1, labels), [0, 1, 2, 3], rows)
    with pytest.raises(DataError, match="got only 1: take a longer training period"):
        rate_baselines(users, items, times, labels, np.flatnonzero(labels == 1), rows)
    with pytest.raises(ConfigError, match="by 'time' or 'user', got 'item'"):
        rate_baselines(users, items, times, labels, rows, rows, by="item")
