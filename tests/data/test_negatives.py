"""Negatives: from the past only, by popularity or evenly, never taken items, exact when items run out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.data import negatives as module
from llmrec_peft.data.log import BehaviorLog, LogSplit
from llmrec_peft.data.negatives import NONE, sample_negatives
from llmrec_peft.errors import DataError


def make_log(rows: list[tuple[str, str, int]], items: int) -> BehaviorLog:
    users, item_ids, times = zip(*rows, strict=True)
    interactions = pa.table(
        {"user_id": list(users), "item_id": list(item_ids), "timestamp": list(times), "label": [1] * len(rows)}
    )
    catalogue = pa.table({"item_id": [f"i{n}" for n in range(items)], "title": [f"Item {n}" for n in range(items)]})
    return BehaviorLog(interactions, catalogue)


def whole(log: BehaviorLog) -> LogSplit:
    return LogSplit("train", log, np.arange(len(log)))


def skewed_log() -> tuple[BehaviorLog, np.ndarray]:
    """Return a log where item n has 2 ** n rows of the past (n < 5), and the rows of 2,000 later users who took i5."""
    past = [(f"p{n}-{copy}", f"i{n}", copy) for n in range(5) for copy in range(2**n)]
    late = [(f"q{n:04d}", "i5", 100) for n in range(2000)]
    log = make_log(past + late, items=7)
    return log, np.flatnonzero(log.timestamps == 100)


@pytest.mark.parametrize("sampling", ["popularity", "uniform"])
def test_only_items_of_the_strict_past_are_drawn(small_log, sampling):
    log = small_log(users=40, items=60)
    drawn = sample_negatives(whole(log), per_positive=4, sampling=sampling, seed=1)
    first_seen = np.full(log.num_items, np.inf)
    np.minimum.at(first_seen, log.item_codes, log.timestamps)
    times = np.repeat(log.timestamps[:, None], 4, axis=1)
    assert (first_seen[drawn[drawn != NONE]] < times[drawn != NONE]).all()
    earliest = log.timestamps == log.timestamps.min()
    assert (drawn[earliest] == NONE).all()
    assert (drawn != NONE).mean() > 0.9


def test_an_item_of_the_same_moment_is_not_the_past():
    log = make_log([("u0", "i0", 1), ("u1", "i1", 5), ("u2", "i2", 5)], items=3)
    drawn = sample_negatives(whole(log), per_positive=2, sampling="uniform", seed=0)
    assert drawn.tolist() == [[NONE, NONE], [0, NONE], [0, NONE]]


@pytest.mark.parametrize("sampling", ["popularity", "uniform"])
@pytest.mark.parametrize("rounds", [module.ROUNDS, 0])
def test_taken_items_and_repeats_are_never_drawn(small_log, monkeypatch, sampling, rounds):
    monkeypatch.setattr(module, "ROUNDS", rounds)
    log = small_log()
    split = log.split().train
    drawn = sample_negatives(split, per_positive=6, sampling=sampling, seed=2)
    assert drawn.shape == (len(split), 6)
    assert drawn.dtype == np.int32
    for row, items in zip(split.rows, drawn, strict=True):
        real = items[items != NONE]
        assert len(set(real.tolist())) == len(real)
        met = (log.user_codes == log.user_codes[row]) & (log.timestamps <= log.timestamps[row])
        assert not set(real.tolist()) & set(log.item_codes[met].tolist())
        assert (items[len(real) :] == NONE).all()


@pytest.mark.parametrize("rounds", [module.ROUNDS, 0])
@pytest.mark.parametrize(
    ("sampling", "shares"),
    [("popularity", np.array([1, 2, 4, 8, 16, 0, 0]) / 31), ("uniform", np.array([1, 1, 1, 1, 1, 0, 0]) / 5)],
)
def test_distribution_follows_the_past(monkeypatch, rounds, sampling, shares):
    """Both ways of drawing: rejection, and the exact fill alone (no rounds)."""
    monkeypatch.setattr(module, "ROUNDS", rounds)
    log, late = skewed_log()
    drawn = sample_negatives(whole(log), per_positive=1, sampling=sampling, seed=4, positives=late)
    counts = np.bincount(drawn[:, 0], minlength=7)
    known = shares > 0
    assert counts[~known].sum() == 0
    chi_square = ((counts - 2000 * shares)[known] ** 2 / (2000 * shares)[known]).sum()
    assert chi_square < 18.5  # 0.1 % of draws from the right distribution exceed it at 4 degrees of freedom


@pytest.mark.parametrize("rounds", [module.ROUNDS, 1, 0])
def test_second_slot_is_drawn_without_replacement(monkeypatch, rounds):
    """P(i4 in a list of two) = p4 + sum over first draws j of pj * p4 / (1 - pj), whichever way finished the list."""
    monkeypatch.setattr(module, "ROUNDS", rounds)
    log, late = skewed_log()
    drawn = sample_negatives(whole(log), per_positive=2, sampling="popularity", seed=5, positives=late)
    shares = np.array([1, 2, 4, 8, 16]) / 31
    expected = shares[4] + sum(shares[j] * shares[4] / (1 - shares[j]) for j in range(4))
    found = (drawn == 4).any(axis=1).mean()
    assert found == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 2000))


def test_popularity_counts_only_rows_before_each_positive():
    rows = [(f"a{n}", "i0", 1) for n in range(50)] + [("b", "i1", 2)] + [(f"c{n}", "i1", 9) for n in range(5000)]
    rows += [(f"late{n:03d}", "i2", 5) for n in range(200)]
    log = make_log(rows, items=3)
    at_five = np.flatnonzero(log.timestamps == 5)
    drawn = sample_negatives(whole(log), per_positive=1, sampling="popularity", seed=0, positives=at_five)
    assert (drawn == 1).mean() < 0.1  # 1 of 51 rows of the past, though 5,001 of 5,051 in all


def test_lists_run_out_exactly():
    log = make_log([("u0", "i0", 1), ("u0", "i1", 2), ("u1", "i2", 3), ("u2", "i3", 4)], items=5)
    drawn = sample_negatives(whole(log), per_positive=6, sampling="popularity", seed=0)
    assert sorted(drawn[3].tolist()) == [NONE, NONE, NONE, 0, 1, 2]
    assert (drawn[:2] == NONE).all()
    assert sorted(drawn[2].tolist()) == [NONE] * 4 + [0, 1]


def test_source_rows_alone_are_counted_when_time_is_ignored(small_log):
    log = small_log(items=60)
    splits = log.split(by="user", valid=0.2, test=0.2)
    drawn = sample_negatives(
        splits.test, per_positive=5, sampling="uniform", seed=0, source=splits.train.rows, past_only=False
    )
    assert (drawn != NONE).all()
    assert np.isin(drawn, log.item_codes[splits.train.rows]).all()


def test_same_seed_same_lists(small_log):
    split = small_log().split().train
    first, again, other = (
        sample_negatives(split, per_positive=3, sampling="popularity", seed=seed) for seed in (9, 9, 10)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_chunks_of_the_exact_fill_do_not_change_its_rules(small_log, monkeypatch):
    monkeypatch.setattr(module, "ROUNDS", 0)
    monkeypatch.setattr(module, "CELLS", 50)
    split = whole(small_log())
    drawn = sample_negatives(split, per_positive=30, sampling="uniform", seed=0)
    log = split.log
    for row, items in enumerate(drawn):
        met = (log.user_codes == log.user_codes[row]) & (log.timestamps <= log.timestamps[row])
        mine = set(log.item_codes[met].tolist())
        known = set(log.item_codes[log.timestamps < log.timestamps[row]].tolist())
        assert set(items[items != NONE].tolist()) == known - mine


def test_bad_arguments_are_named(small_log):
    split = small_log().split().train
    with pytest.raises(
        DataError, match="sampling must be one of popularity, uniform, not 'pop'; set negatives.sampling"
    ):
        sample_negatives(split, per_positive=1, sampling="pop", seed=0)
    with pytest.raises(DataError, match="per_positive must be at least 1, not 0"):
        sample_negatives(split, per_positive=0, sampling="uniform", seed=0)
    with pytest.raises(DataError, match="positives has row -1, but the log has"):
        sample_negatives(split, per_positive=1, sampling="uniform", seed=0, positives=np.array([-1]))
    with pytest.raises(DataError, match="source has no rows"):
        sample_negatives(split, per_positive=1, sampling="uniform", seed=0, source=np.array([], dtype=np.int64))
