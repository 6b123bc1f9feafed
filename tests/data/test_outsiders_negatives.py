"""One rule for sampled negatives, from reports on retail: 0 % of them taken before in training, 11.6 % in the test.

What fails the same way: an item taken in an earlier split, as a `context_only` row, in the same basket, or by the
positive itself (a repeat purchase) as a negative; and an item that can be no negative since its user takes it later.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.config.schema import RankingConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog, LogSplit
from llmrec_peft.data.negatives import NONE, sample_negatives
from llmrec_peft.data.streams import build_streams
from llmrec_peft.runs.candidate_sets import CandidateSets

DOMAIN = {
    "name": "shop",
    "event": "{title}",
    "outcomes": {"skip": " no\n", "buy": " yes\n"},
    "simultaneous": "isolate",
    "negatives": {"per_positive": 3},
    "stream": {"context": 2, "targets": 3, "max_length": 400},
}
CATALOGUE = pa.table({"item_id": [f"i{n}" for n in range(12)], "title": [f"Item {n}" for n in range(12)]})
USERS, BASKETS = 30, 12


def purchases(seed: int = 3) -> dict[str, list]:
    """Baskets of two items in which every user comes back to favourites; a fifth of the early rows is history alone."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(USERS):
        favourites = rng.choice(12, 5, replace=False)
        for basket in range(BASKETS):
            time = 1_000_000_000 + basket * 86_400 + user
            for item in rng.choice(favourites if rng.random() < 0.7 else 12, 2, replace=False):
                hidden = basket < 8 and bool(rng.random() < 0.2)
                rows.append((f"u{user:02d}", f"i{item}", time, 1, hidden))
    names = ("user_id", "item_id", "timestamp", "label", "context_only")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


@pytest.fixture(scope="module")
def log() -> BehaviorLog:
    return BehaviorLog(pa.table(purchases()), CATALOGUE, name="shop")


def drawn(log, tokenizer, by="time", **changes):
    """(name, users, times, items) of each split's sampled negatives, as the streams hold them."""
    domain = Domain.from_dict({**DOMAIN, "split": {"by": by, "valid": 0.2, "test": 0.2}, **changes})
    splits = log.split(by=by, valid=0.2, test=0.2)
    source = splits.train.rows if by == "user" else None
    for name, split in splits.items():
        streams = build_streams(split, domain, tokenizer, source=source)
        rows = streams.target_rows[streams.sampled]
        assert len(rows) > 50
        yield name, log.user_codes[rows], log.timestamps[rows], streams.target_items[streams.sampled]


def first_taken(log) -> np.ndarray:
    """Time [users, items] of the first row of each pair; inf without one."""
    times = np.full((log.num_users, log.num_items), np.inf)
    np.minimum.at(times, (log.user_codes, log.item_codes), log.timestamps)
    return times


@pytest.mark.parametrize("by", ["time", "user"])
@pytest.mark.parametrize("simultaneous", ["isolate", "order"])
@pytest.mark.parametrize("sampling", ["popularity", "uniform"])
def test_no_negative_was_taken_before_or_then_in_any_split(log, tiny_tokenizer, by, simultaneous, sampling):
    rules = {"simultaneous": simultaneous, "negatives": {"per_positive": 3, "sampling": sampling}}
    first = first_taken(log)
    for name, users, times, items in drawn(log, tiny_tokenizer, by, **rules):
        assert not (first[users, items] <= times).any(), name


def test_what_a_user_takes_later_can_be_a_negative_in_every_split(log, tiny_tokenizer):
    first = first_taken(log)
    for name, users, times, items in drawn(log, tiny_tokenizer):
        later = np.isfinite(first[users, items]) & (first[users, items] > times)
        assert later.any(), name


@pytest.mark.parametrize("sampling", ["popularity", "uniform"])
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_cutting_the_future_off_changes_no_negative(log, sampling, name):
    """Popularity, known items and what is excluded: nothing of a later moment has a part in a draw."""
    rows = log.split(valid=0.2, test=0.2)[name].rows
    moment = np.quantile(log.timestamps[rows], 0.6)
    kept = np.flatnonzero(log.timestamps <= moment)
    past = BehaviorLog(log.interactions.take(pa.array(kept)), log.items, name="past")
    options = {"per_positive": 2, "sampling": sampling, "seed": 5}
    early = rows[log.timestamps[rows] <= moment]
    whole = sample_negatives(LogSplit(name, log, rows), positives=early, **options)
    cut = sample_negatives(LogSplit(name, past, np.searchsorted(kept, early)), **options)
    assert (whole != NONE).any() and np.array_equal(whole, cut)


def test_every_item_of_the_past_can_be_drawn_and_no_other(log):
    """The exact rule, positive by positive: known before, and not yet the user's."""
    rows = log.split(valid=0.2, test=0.2).test.rows
    lists = sample_negatives(LogSplit("test", log, rows), per_positive=log.num_items, sampling="uniform", seed=0)
    first, seen = first_taken(log), np.full(log.num_items, np.inf)
    np.minimum.at(seen, log.item_codes, log.timestamps)
    for row, items in zip(rows, lists, strict=True):
        time = log.timestamps[row]
        allowed = np.flatnonzero((seen < time) & (first[log.user_codes[row]] > time))
        assert sorted(items[items != NONE].tolist()) == allowed.tolist()


def test_lists_that_run_out_are_counted(log, tiny_tokenizer, caplog):
    domain = Domain.from_dict({**DOMAIN, "negatives": {"per_positive": 9}})
    with caplog.at_level(logging.WARNING, "llmrec_peft"):
        streams = build_streams(log.split(valid=0.2, test=0.2).test, domain, tiny_tokenizer)
    positives = (~streams.sampled).sum()
    assert f"of {positives} positives have fewer than 9 sampled negatives, and 0 have none" in caplog.text
    assert "lower negatives.per_positive" in caplog.text


def test_an_ordinary_log_warns_of_nothing(log, tiny_tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "llmrec_peft"):
        list(drawn(log, tiny_tokenizer, negatives={"per_positive": 1}))
    assert not caplog.records


def test_candidate_sets_follow_the_same_rule(log):
    """Where items with a label are not recommended again, which is the default."""
    domain = Domain.from_dict({**DOMAIN, "split": {"by": "time", "valid": 0.2, "test": 0.2}})
    lists = CandidateSets(log.split(valid=0.2, test=0.2), "test", domain, RankingConfig(candidates=8))
    first = first_taken(log)
    for row in lists.rows:
        others = lists.candidates(int(row))[1:]
        assert (first[log.user_codes[row], others] > log.timestamps[row]).all()
