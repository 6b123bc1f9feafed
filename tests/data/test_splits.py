"""Splits by time and by user: boundaries, ties, shares, the rows that are never targets, and the leakage check."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.data.leakage import check_leakage
from llmrec_peft.data.log import BehaviorLog, LogSplit, Splits
from llmrec_peft.data.splits import split_rows
from llmrec_peft.errors import DataError


def make_log(users, times, **columns) -> BehaviorLog:
    rows = len(users)
    interactions = {
        "user_id": [f"u{user}" for user in users],
        "item_id": ["i0"] * rows,
        "timestamp": list(times),
        "label": [row % 2 for row in range(rows)],
        **columns,
    }
    return BehaviorLog(pa.table(interactions), pa.table({"item_id": ["i0"], "title": ["One"]}), name="made")


def times_of(split: LogSplit) -> np.ndarray:
    return split.log.timestamps[split.rows]


def test_time_split_orders_the_moments_and_covers_every_row(small_log):
    log = small_log()
    splits = log.split(by="time", valid=0.2, test=0.1)
    assert times_of(splits.train).max() < times_of(splits.valid).min()
    assert times_of(splits.valid).max() < times_of(splits.test).min()
    assert splits.boundaries == (times_of(splits.valid).min(), times_of(splits.test).min())
    everything = np.concatenate([split.rows for _, split in splits.items()])
    assert np.array_equal(np.sort(everything), np.arange(len(log)))
    assert len(splits.valid) == pytest.approx(0.2 * len(log), abs=3)
    assert len(splits.test) == pytest.approx(0.1 * len(log), abs=3)
    for _, split in splits.items():
        assert split.rows.dtype == np.int64
        assert (np.diff(split.rows) > 0).all()
    check_leakage(splits)


def test_rows_of_one_moment_stay_together():
    # The wanted cuts (rows 8 and 9 of 10) fall inside a run of ties; the nearest moments are taken.
    times = [0, 1, 2, 3, 4, 5, 5, 5, 5, 9]
    splits = make_log(range(10), times).split(valid=0.1, test=0.1)
    assert sorted(times_of(splits.train)) == [0, 1, 2, 3, 4]
    assert sorted(times_of(splits.valid)) == [5, 5, 5, 5]
    assert sorted(times_of(splits.test)) == [9]


def test_float_times_split():
    splits = make_log(range(4), [0.25, 0.5, 0.75, 1.5]).split(valid=0.25, test=0.25)
    assert splits.boundaries == (0.75, 1.5)


def test_user_split_deals_whole_users_by_seed(small_log):
    log = small_log()
    splits = log.split(by="user", valid=0.1, test=0.2, seed=3)
    assert (len(splits.train.users), len(splits.valid.users), len(splits.test.users)) == (14, 2, 4)
    assert splits.boundaries is None
    owners = np.concatenate([split.users for _, split in splits.items()])
    assert np.array_equal(np.sort(owners), np.arange(log.num_users))
    assert sum(len(split) for _, split in splits.items()) == len(log)
    check_leakage(splits)
    again = log.split(by="user", valid=0.1, test=0.2, seed=3)
    other = log.split(by="user", valid=0.1, test=0.2, seed=4)
    assert np.array_equal(splits.test.rows, again.test.rows)
    assert not np.array_equal(splits.test.users, other.test.users)


@pytest.mark.parametrize("by", ["time", "user"])
def test_context_only_rows_are_never_targets(by):
    hidden = [row % 3 == 0 for row in range(12)]
    log = make_log([row // 2 for row in range(12)], range(12), context_only=hidden)
    splits = log.split(by=by, valid=0.25, test=0.25)
    targets = np.concatenate([split.rows for _, split in splits.items()])
    assert len(targets) == 8
    assert not log.interactions["context_only"].to_numpy()[targets].any()


def test_log_split_is_split_rows(small_log):
    log = small_log()
    arrays = (log.user_codes, log.timestamps, log.context_only)
    ours, (theirs, _) = (
        log.split(by="user", seed=5),
        split_rows(*arrays, by="user", valid=0.1, test=0.1, seed=5, name="x"),
    )
    assert all(np.array_equal(ours[name].rows, rows) for name, rows in zip(ours, theirs, strict=True))


def test_splits_go_by_name(small_log):
    splits = small_log().split()
    assert list(splits) == ["train", "valid", "test"]
    assert splits["valid"] is splits.valid
    assert [split.name for _, split in splits.items()] == ["train", "valid", "test"]
    with pytest.raises(DataError, match="no split 'dev'; use one of train, valid, test"):
        splits["dev"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "week"}, "by must be one of time, user, not 'week'; set split.by"),
        ({"valid": 0.0}, "valid must lie between 0 and 1, not 0.0"),
        ({"test": 1.5}, "test must lie between 0 and 1, not 1.5"),
        ({"test": float("nan")}, "test must lie between 0 and 1, not nan"),
        ({"valid": 0.5, "test": 0.5}, "valid \\+ test must be below 1, not 0.5 \\+ 0.5"),
    ],
)
def test_bad_arguments_are_named(small_log, arguments, message):
    with pytest.raises(DataError, match=message):
        small_log().split(**arguments)


def test_logs_that_cannot_be_split_say_why():
    with pytest.raises(DataError, match="all 4 targets of log 'made' have timestamp 7, .* use split.by: user"):
        make_log(range(4), [7] * 4).split()
    with pytest.raises(DataError, match="only 2 different timestamps, and three splits need 3; use split.by: user"):
        make_log(range(4), [1, 1, 2, 2]).split()
    with pytest.raises(DataError, match="has 2 users with targets, and three splits by user need 3"):
        make_log([0, 1, 1], [1, 2, 3]).split(by="user")
    with pytest.raises(DataError, match="all 2 rows of log 'made' are context_only"):
        make_log([0, 1], [1, 2], context_only=[True, True]).split()


def test_an_emptied_split_is_named():
    with pytest.raises(DataError, match=r"train of log 'made' is empty \(by user, valid 0.48, test 0.48, 10 targets\)"):
        make_log(range(10), range(10)).split(by="user", valid=0.48, test=0.48)


def swap(splits: Splits, **rows) -> Splits:
    parts = {name: LogSplit(name, split.log, rows.get(name, split.rows)) for name, split in splits.items()}
    return Splits(**parts, by=splits.by)


def test_leakage_names_a_row_in_two_splits():
    splits = make_log(range(10), range(10)).split()
    leaking = swap(splits, valid=np.append(splits.valid.rows, splits.test.rows))
    with pytest.raises(DataError, match=r"1 rows are targets of valid and of test: row 9 \(user u9, time 9\); give"):
        check_leakage(leaking)
    with pytest.raises(DataError, match=r"1 rows are targets of test twice: row 9 \(user u9, time 9\)"):
        check_leakage(swap(splits, test=np.array([9, 9])))


def test_leakage_names_targets_that_are_not_before_the_later_split():
    log = make_log(range(10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 8])  # rows 8 and 9 share a moment
    splits = Splits(
        LogSplit("train", log, np.arange(7)),
        LogSplit("valid", log, np.array([7, 8])),
        LogSplit("test", log, np.array([9])),
        by="time",
    )
    late = r"1 rows are targets of valid but not before the first target of test \(time 8\): row 8 \(user u8, time 8\)"
    with pytest.raises(DataError, match=late):
        check_leakage(splits)
    early = swap(splits, train=np.array([0, 1, 2, 3, 8]), valid=np.array([4, 5]))
    with pytest.raises(DataError, match=r"targets of train but not before the first target of valid \(time 4\): row 8"):
        check_leakage(early)


def test_leakage_names_users_in_two_splits_and_counts_beyond_three():
    log = make_log([0] * 6 + [1, 2, 3], range(9))
    splits = Splits(
        LogSplit("train", log, np.arange(5)),
        LogSplit("valid", log, np.array([5, 6])),
        LogSplit("test", log, np.array([7, 8])),
        by="user",
    )
    with pytest.raises(DataError, match=r"5 rows are of users .* both train and valid: row 0 .*; row 2 .* and 2 more;"):
        check_leakage(splits)


def test_leakage_names_context_only_targets():
    log = make_log(range(6), range(6), context_only=[False, True, False, False, False, False])
    splits = log.split()
    with pytest.raises(DataError, match=r"context_only and yet targets of train: row 1 \(user u1, time 1\)"):
        check_leakage(swap(splits, train=np.array([0, 1])))
