"""Calls of very many candidates: computed in chunks, with progress, in memory that does not grow with them.

The kind: whatever brings many candidates into one call - one long list, many requests of a bank or scorer, a whole item
table in `recommend`, mappings that no table has, the same candidate over and over - was made tokens all at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft import DomainBank, Scorer
from llmrec_peft.errors import DataError, StreamError
from llmrec_peft.requests.request import Request
from llmrec_peft.requests.request_encoder import RequestEncoder
from llmrec_peft.scoring import chunks
from tests.support.requests import CALIBRATION, HISTORY, MOVIES, SHOP, SHOP_HISTORY, USER

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {"title": "A very long title of an item, " * 12, "genres": "Drama"}  # leaves out some of the history
OWN = [{"title": f"Own {n}", "genres": "Comedy"} for n in range(9)]
MIXED = [*MOVIES, LONG, *OWN, "i3", {"item_id": "i5"}, LONG, *MOVIES, *OWN[:4]]


class Alive:
    """Candidates that are tokens: how many now, and at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = self.calls = 0
        self._seen: set[int] = set()
        make = RequestEncoder.encode_events

        def events(owner, given, what, *rest):
            found = make(owner, given, what, *rest)
            if what == "candidates":
                self.calls += 1
                for tokens in found:
                    if id(tokens) not in self._seen:
                        self._seen.add(id(tokens))
                        self.now += 1
                        weakref.finalize(tokens, self._gone, id(tokens))
                self.peak = max(self.peak, self.now)
            return found

        monkeypatch.setattr(RequestEncoder, "encode_events", events)

    def _gone(self, number: int) -> None:
        self._seen.discard(number)
        self.now -= 1


class Bar:
    """Stands for tqdm, and writes down what it is told."""

    made: list[Bar]

    def __init__(self, total: int, desc: str, **_options) -> None:
        self.total, self.desc, self.n, self.updates = total, desc, 0, 0
        self.made.append(self)

    def update(self, count: int) -> None:
        self.n += count
        self.updates += 1

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_error) -> None:
        pass


@pytest.fixture
def small_chunks(monkeypatch):
    """`small_chunks(n)`: chunks of n candidates from now on."""
    return lambda size=7: monkeypatch.setattr(chunks, "CHUNK", size)


@pytest.fixture
def bank(bundle_of, tiny_base, items) -> DomainBank:
    bundles = {
        "movies": bundle_of(calibration=CALIBRATION),
        "shop": bundle_of("adapter", "shop", seed=1),
        "other": bundle_of(seed=2),
    }
    return DomainBank.load(tiny_base(), bundles, {"movies": items, "other": items})


def close(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    """Equal but for float32: rows of other lengths round this base's wide weights apart by up to 4e-6."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache_bytes", [0, 2**24])
def test_chunks_predict_as_one_pass_does(cache_bytes, bundle_of, items, small_chunks):
    scorer = Scorer.load(bundle_of(calibration=CALIBRATION), items, cache_bytes=cache_bytes)
    given = [MIXED, tuple(MIXED), np.array(MOVIES * 3), [f"i{n % 24}" for n in range(100)], MIXED[:8]]
    whole = [scorer.score(HISTORY, candidates) for candidates in given]
    assert len(set(scorer.encoder.encode(Request(HISTORY, MIXED)).dropped[:9])) > 1
    for size in (1, 7, 8):
        small_chunks(size)
        close([scorer.score(HISTORY, candidates) for candidates in given], whole)


def test_where_batches_are_the_same_so_are_the_bits(bundle_of, items, small_chunks):
    """One candidate a forward pass, after a cached history."""
    scorer = Scorer.load(bundle_of(), items)
    scorer.score(HISTORY, MOVIES[:1])
    whole = np.concatenate([scorer.score(HISTORY, [one]) for one in MIXED])
    small_chunks(1)
    assert np.array_equal(scorer.score(HISTORY, MIXED), whole)


def test_mixed_requests_of_a_bank(bank, small_chunks):
    """Of several domains, with the same histories far apart, without candidates, and longer than a part."""
    requests = [
        ("movies", HISTORY, MIXED), ("shop", SHOP_HISTORY, SHOP, USER), ("movies", [], []), ("other", HISTORY, MOVIES),
        ("shop", [], SHOP * 5, USER), ("movies", [], MIXED), ("movies", HISTORY, MOVIES[:2]), ("other", HISTORY, MIXED),
    ]  # fmt: skip
    whole = bank.score(requests)
    assert [len(one) for one in whole] == [len(request[2]) for request in requests]
    for size in (3, 7, 50):
        small_chunks(size)
        close(bank.score(requests), whole)
    close(bank.scorer("other").score_many([(HISTORY, MOVIES), (HISTORY, MIXED)]), [whole[3], whole[7]])


def test_tokens_in_memory_are_bounded(bundle_of, items, bank, small_chunks, monkeypatch):
    """One list, many requests, and a list of few that come again: as one pass, all were there at once."""
    scorer = Scorer.load(bundle_of(), items)
    own = [{"title": f"Own {n}", "genres": "Comedy"} for n in range(300)]
    for encoder in (scorer.encoder, bank.scorer("other").encoder):
        encoder.cache.max_entries = 10
    alive = Alive(monkeypatch)
    whole = scorer.score(HISTORY, own)
    assert alive.peak >= 300 and alive.now <= 10
    small_chunks(8)
    most = 2 * 8 + 10  # the batch, what is added to it, and the cache
    requests = [("other", HISTORY[: n % 3], own[10 * n : 10 * n + 10]) for n in range(30)]
    for work in (
        lambda: scorer.score(HISTORY, own),
        lambda: scorer.score(HISTORY, own * 2),
        lambda: scorer.score(HISTORY, own[:20] * 30),
        lambda: bank.score(requests),
    ):
        alive.peak = alive.now
        work()
        assert alive.peak <= most and alive.now <= 2 * 10
    close([scorer.score(HISTORY, own * 2)], [np.concatenate([whole, whole])])


def test_repeated_candidates_are_computed_once(bundle_of, items, small_chunks, monkeypatch):
    scorer = Scorer.load(bundle_of(), items)
    rows = []
    run = scorer._bank._engine._run
    monkeypatch.setattr(scorer._bank._engine, "_run", lambda own: (rows.extend(own), run(own))[1])
    small_chunks(8)
    many = MOVIES[:5] * 60
    found = scorer.score(HISTORY, many)
    assert sum(row.last - row.first for row in rows) == 5
    monkeypatch.setattr(chunks, "REPEATS", 4)
    rows.clear()
    close([scorer.score(HISTORY, many)], [found])
    assert sum(row.last - row.first for row in rows) == 5 * -(-300 // 32)


def test_small_calls_go_through_in_one_pass(bundle_of, items, monkeypatch):
    """No part and no bar: their tokens are made once."""
    scorer = Scorer.load(bundle_of(), items)
    alive = Alive(monkeypatch)
    monkeypatch.setattr(chunks, "tqdm", None)
    monkeypatch.setattr(chunks, "CHUNK", len(MIXED))
    scorer.score(HISTORY, MIXED)
    assert alive.calls == 1


def test_progress_counts_all_candidates(bundle_of, items, small_chunks, monkeypatch):
    """Also where the same stand twice, and where the requests are many."""
    scorer = Scorer.load(bundle_of(), items)
    small_chunks()
    monkeypatch.setattr(chunks, "tqdm", Bar)
    for work in (lambda: scorer.score(HISTORY, MIXED), lambda: scorer.score_many([(HISTORY, MOVIES), ([], MIXED)] * 3)):
        Bar.made = []
        work()
        assert [bar.desc for bar in Bar.made] == ["checking", "scoring"]
        for bar in Bar.made:
            assert bar.n == bar.total >= len(MIXED) and bar.updates > 3


@pytest.mark.parametrize(
    ("last", "kind", "message"),
    [
        ("zz", DataError, "candidates: item 'zz' is unknown"),
        (3.5, DataError, "candidates: entry 50 must be an item id"),
        ({"genres": "Drama"}, DataError, "lacks title"),
        ({"title": "long " * 900, "genres": "Drama"}, StreamError, "candidate 50 takes"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_computed(last, kind, message, bundle_of, items, small_chunks):
    scorer = Scorer.load(bundle_of(), items)
    scorer._bank._engine._run = None
    small_chunks()
    with pytest.raises(kind, match=message):
        scorer.score(HISTORY, [*["i3"] * 50, last])
    with pytest.raises(kind, match=f"request 1: .*{message}"):
        scorer.score_many([(HISTORY, MIXED), (HISTORY, [*["i3"] * 50, last])])


def test_a_list_that_shrinks_meanwhile_is_refused(bundle_of, items, small_chunks):
    """At the end of a part and inside one, and one whose length is not that of what it holds."""

    class Shrinks(Sequence):
        def __init__(self, left: int) -> None:
            self.left, self.read = left, 0

        def __len__(self) -> int:
            return 21

        def __getitem__(self, place: int) -> str:
            raise AssertionError

        def __iter__(self):
            self.read += 1
            return iter(["i3"] * (21 if self.read == 1 else self.left))

    scorer = Scorer.load(bundle_of(), items)
    small_chunks()
    for left in (0, 14, 20):
        with pytest.raises(DataError, match=f"21 were given, and only {left} are left"):
            scorer.score(HISTORY, Shrinks(left))


@pytest.mark.parametrize("context", [None, {"genres": "Noir"}])
def test_a_whole_table_is_recommended_in_parts(context, bundle_of, small_chunks):
    table = pa.table({"item_id": [str(n) for n in range(60)], "title": [f"Film {n}" for n in range(60)]})
    table = table.append_column("genres", pa.array(["Drama"] * 60))
    scorer = Scorer.load(bundle_of(), table)
    history = [("3", "like"), ("4", "dislike")]
    given = [7, "5", 7, 9, "3", *range(20, 40)]
    calls = (
        lambda: scorer.recommend(history, 60, context=context),
        lambda: scorer.recommend(history, 60, context=context, candidates=given),
        lambda: scorer.recommender().recommend_many([history, []], 60, contexts=[context, None])[1],
    )
    whole = [call() for call in calls]
    assert [len(found) for found in whole] == [58, 23, 60]
    small_chunks()
    for call, wanted in zip(calls, whole, strict=True):
        found = {one.item_id: one.probabilities for one in call()}
        assert found.keys() == {one.item_id for one in wanted}
        close([np.array([found[one.item_id] for one in wanted])], [np.array([one.probabilities for one in wanted])])
