"""Rows that repeat user, item and moment, from reports on logs with `simultaneous: order`, where they show the label.

What fails the same way: a row three times, repeats with different labels, a repeat of a `context_only` row, and a
repeat without a label that a teacher is asked about.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import build_streams
from llmrec_peft.errors import DomainError
from llmrec_peft.retrieval.histories import feedback
from llmrec_peft.runs.logged_events import LoggedEvents

DOMAIN = {
    "name": "shop",
    "event": "{title}",
    "outcomes": {"skip": " no\n", "buy": " yes\n"},
    "stream": {"context": 3, "targets": 4, "max_length": 400},
}
CATALOGUE = pa.table({"item_id": [f"i{n}" for n in range(6)], "title": [f"Item {n}" for n in range(6)]})
CASES = {
    "twice": [(0, False), (0, False)],
    "three times": [(1, False), (1, False), (1, False)],
    "another label": [(1, False), (0, False)],
    "history and target": [(0, False), (1, True)],
    "target after history": [(1, True), (0, False)],
    "without a label": [(1, False), (None, False)],
}
KEPT = {"twice": 1, "three times": 2, "another label": 1, "history and target": 0, "target after history": 1,
        "without a label": 0}  # fmt: skip
"""Which of a case's rows stays."""
DAY = 86_400


def repeating(case: str) -> tuple[BehaviorLog, np.ndarray]:
    """A log in which each of four users has the case's rows at one moment of day 2 to 5; and their row numbers."""
    rows = []
    for user in range(4):
        for day in range(9):
            rows.append((f"u{user}", f"i{day % 4}", day * DAY, (user + day) % 2, False))
        moment = (2 + user) * DAY + 3600
        rows += [(f"u{user}", "i5", moment, *values) for values in CASES[case]]
        rows.append((f"u{user}", "i4", moment, 1, False))
    names = ("user_id", "item_id", "timestamp", "label", "context_only")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    log = BehaviorLog(pa.table(columns | {"timestamp": [10**9 + time for time in columns["timestamp"]]}), CATALOGUE)
    return log, np.flatnonzero(log.item_codes == 5).reshape(4, -1)


def domain(**changes) -> Domain:
    return Domain.from_dict({**DOMAIN, "label": {"missing": "leave_out"}, **changes})


def streams_for_split(log, rule: Domain, tokenizer, unlabelled=False):
    splits = log.split(valid=0.1, test=0.1)
    return build_streams(splits.train, rule, tokenizer, unlabelled=unlabelled)


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_order_keeps_one_row_of_each_event(tiny_tokenizer, case, unlabelled):
    log, rows = repeating(case)
    found = streams_for_split(log, domain(), tiny_tokenizer, unlabelled)
    answered = found.target_rows[found.target_items == 5].tolist()
    assert sorted(answered) == rows[:, KEPT[case]].tolist()
    for window in range(len(found)):
        text = tiny_tokenizer.decode(found[window].input_ids.tolist())
        assert text.count("Item 5") <= 1


@pytest.mark.parametrize("case", CASES)
def test_all_that_reads_the_log_keeps_the_same_rows(case):
    """Collaborative models, histories of recommendations and baselines read labels by the same rule as the streams."""
    log, rows = repeating(case)
    for classes in (domain().classes(log), feedback(log, domain()), LoggedEvents(log, domain()).classes):
        assert (classes[rows] >= 0).sum(1).tolist() == [1] * 4
        assert (classes[rows[:, KEPT[case]]] >= 0).all()
        assert (classes[log.item_codes != 5] >= 0).all()


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, False), ({"duplicates": "keep"}, True), ({"simultaneous": "isolate"}, True),
     ({"simultaneous": "isolate", "duplicates": "drop"}, False), ({"duplicates": None}, False)],
)  # fmt: skip
def test_the_default_is_drop_for_order_and_keep_for_isolate(tiny_tokenizer, changes, kept):
    log, rows = repeating("three times")
    rule = domain(**changes)
    assert rule.duplicates == ("keep" if kept else "drop") and Domain.from_dict(rule.to_dict()) == rule
    found = streams_for_split(log, rule, tiny_tokenizer)
    assert (found.target_items == 5).sum() == (rows.size if kept else len(rows))


@pytest.mark.parametrize("case", ["twice", "three times", "another label"])
def test_a_warning_counts_them(tiny_tokenizer, caplog, case):
    log, rows = repeating(case)
    surplus = rows.size - len(rows)
    with caplog.at_level(logging.WARNING, "llmrec_peft"):
        streams_for_split(log, domain(), tiny_tokenizer)
        streams_for_split(log, domain(duplicates="keep"), tiny_tokenizer)
        streams_for_split(log, domain(simultaneous="isolate"), tiny_tokenizer)
    dropped, seen = (record.getMessage() for record in caplog.records)
    differing = 4 if case == "another label" else 0
    for message in (dropped, seen):
        assert f"{surplus} rows ({surplus} in the whole log) repeat the user, item and moment" in message
        assert f"{differing} such events of the log with different labels" in message
    assert "duplicates: drop" in dropped and "they see its outcome in the history; set duplicates: drop" in seen


def test_near_repeats_are_none(tiny_tokenizer, caplog):
    """Another user, another item, or another moment is another event."""
    rows = [(u, i, t, 1) for u in ("a", "b") for i in ("i0", "i1") for t in (1e9, 1e9 + 0.5, 1e9 + 1)]
    log = BehaviorLog(pa.table(dict(zip(("user_id", "item_id", "timestamp", "label"), zip(*rows, strict=True),
                                        strict=True))), CATALOGUE)  # fmt: skip
    assert not len(log.duplicates.rows) and (domain().classes(log) == 1).all()
    with caplog.at_level(logging.WARNING, "llmrec_peft"):
        streams_for_split(log, domain(), tiny_tokenizer)
    assert not caplog.records


def test_groups_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = int(rng.integers(1, 40))
        users, items, times, labels = (rng.integers(0, n, size) for n in (3, 3, 4, 2))
        hidden = rng.random(size) < 0.3
        log = BehaviorLog(pa.table({"user_id": [f"u{n}" for n in users], "item_id": [f"i{n}" for n in items],
                                    "timestamp": times + 10**9, "label": labels, "context_only": hidden}),
                          CATALOGUE)  # fmt: skip
        hidden = log.column("context_only").to_numpy()
        best: dict[tuple, tuple] = {}
        for row in range(size):
            event = (log.user_codes[row], log.item_codes[row], log.timestamps[row])
            best[event] = max(best.get(event, (False, -1)), (not hidden[row], row))
        expected = {row for _, row in best.values()}
        assert set(np.flatnonzero(domain().classes(log) >= 0).tolist()) == expected


def test_manifests_from_before_the_key_keep_every_row():
    """A bundle that was trained and measured with every row goes on so, and its manifest stays as it was sealed."""
    content = {name: value for name, value in domain().to_dict().items() if name != "duplicates"}
    before = dict(content)
    assert Domain.of_manifest(content).duplicates == "keep" and content == before
    assert Domain.of_manifest(domain().to_dict()).duplicates == "drop"


def test_other_words_are_refused():
    for value in ("first", True, ["drop"]):
        with pytest.raises(DomainError, match="duplicates must be one of keep, drop; got"):
            domain(duplicates=value)
