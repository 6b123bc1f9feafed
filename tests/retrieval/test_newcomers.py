"""A user without a history and an item without interactions: on the simulated shop, and on real logs where given.

`LLMREC_PEFT_DATA` names a directory with the real logs `movies`, `retail` and `coupons`, each laid out as a log is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft import Domain, Scorer
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.simulate import simulate_shop
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.histories import Histories, feedback
from llmrec_peft.retrieval.recommender import Recommender
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.runs.logged_events import LoggedEvents
from tests.conftest import ROOT
from tests.support.bundles import write_bundle

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = os.environ.get("LLMREC_PEFT_DATA")
ABSENT = pytest.mark.skipif(REAL is None, reason="LLMREC_PEFT_DATA names no directory of real logs")
TWIN = "nobody met it"


@dataclass
class Shop:
    """A log with a twin of a liked item in its table, which no row has."""

    log: BehaviorLog
    domain: Domain
    train: np.ndarray
    later: np.ndarray
    retrieval_index: RetrievalIndex
    scorer: Scorer
    liked: str

    @property
    def asked(self) -> dict[str, Any]:
        """The header's columns, and those of the moment, as the log's first row has them."""
        logged = LoggedEvents(self.log, self.domain)
        user = {name: logged.first(0, name) for name in self.domain.header_columns}
        return {"user": user, "context": logged.moments(np.array([0]))[0] or None}

    @property
    def taste(self) -> list[tuple[Any, str]]:
        """The history of one who liked an item and nothing else."""
        label = next(name for n, name in enumerate(self.domain.labels) if n != self.domain.negative_class)
        return [({"item_id": self.liked, **(self.asked["context"] or {})}, label)]


@pytest.fixture(
    scope="module", params=["shop", *(pytest.param(name, marks=ABSENT) for name in ("movies", "retail", "coupons"))]
)
def shop(request, tiny_base, tmp_path_factory) -> Shop:
    name = request.param
    domain = Domain.from_yaml(ROOT / "recipes" / "configs" / name / "domain.yaml")
    log = simulate_shop() if name == "shop" else BehaviorLog.read(Path(REAL) / name)
    splits = log.split(by=domain.split.by, valid=domain.split.valid, test=domain.split.test)
    labels = feedback(log, domain)
    train, later = splits.train.rows, np.concatenate([splits.valid.rows, splits.test.rows])
    retrieval_index = RetrievalIndex.fit(log, train, labels, timed=domain.split.by == "time")
    # The item most taken, so that it is well known.
    liked = int(np.bincount(log.item_codes[train[labels[train] == 1]]).argmax())
    twin = log.items.slice(liked, 1).set_column(
        log.items.column_names.index("item_id"), "item_id", pa.array([TWIN], log.items.schema.field("item_id").type)
    )
    table = pa.concat_tables([twin, log.items])
    bundle = write_bundle(
        tmp_path_factory.mktemp(name) / "bundle", tiny_base("llama"), domain=domain.to_dict(), scale=0.3
    )
    scorer = Scorer.load(bundle, table)
    scorer.retrieval_index = retrieval_index
    return Shop(log, domain, train, later, retrieval_index, scorer, log.items.column("item_id")[liked].as_py())


def share_taken(shop: Shop, codes: np.ndarray) -> float:
    """Share of the later positives that are of these items."""
    taken = shop.log.item_codes[shop.later[feedback(shop.log, shop.domain)[shop.later] == 1]]
    return float(np.isin(taken, codes).mean())


def test_a_new_user_is_led_by_what_many_take(shop):
    """The bundle is noise, so that what the list is worth comes from who named its items."""
    found = shop.scorer.recommend([], k=20, pool=20, **shop.asked)
    assert len(found) == min(20, len(shop.scorer.items)) == len({entry.item_id for entry in found})
    numbers = np.array([entry.probabilities for entry in found])
    assert np.isfinite(numbers).all() and (numbers > 0).all()
    np.testing.assert_allclose(numbers.sum(axis=1), 1, atol=1e-6)
    led = [entry for entry in found if entry.source == "popularity"]
    assert {entry.source for entry in found} <= {"popularity", "fresh", "fill"}
    if len(shop.scorer.items) < 21:  # all of it
        return
    assert len(led) >= 18
    taken = shop.train[feedback(shop.log, shop.domain)[shop.train] == 1]
    counts = np.bincount(shop.log.item_codes[taken], minlength=shop.log.num_items)
    codes = np.array([shop.log.item_index(entry.item_id) for entry in led])
    assert counts[codes].min() > np.median(counts)
    # So many times what chance would be worth. The simulated shop shows all its products alike: only liking differs.
    least = 1.2 if shop.domain.name == "shop" else 2
    assert share_taken(shop, codes) > least * len(codes) / shop.log.num_items


def test_a_fusion_puts_what_a_new_user_would_take_first(shop):
    """The bundle is noise; what the fusion adds to it moves what is liked more often towards the top of the list."""
    labels, rows = feedback(shop.log, shop.domain), shop.later[:4000]
    rows = rows[labels[rows] >= 0]
    if not (labels[rows] == 0).any():
        pytest.skip("a log of positives alone has no one to tell them from without sampling")
    features = shop.retrieval_index.target_features(shop.log, labels, rows)
    fusion = Fusion.fit(np.zeros((len(rows), 2)), features, labels[rows], shop.log.user_codes[rows])
    assert fusion.strength is not None
    rates, worth = shop.retrieval_index.models["rates"].item_rates(), {}
    for name, own in (("fused", fusion), ("alone", None)):
        recommender = Recommender(shop.scorer, shop.retrieval_index, own)
        found = recommender.recommend([], k=400, pool=400, **shop.asked)
        assert np.isfinite([entry.score for entry in found]).all()
        known = [shop.log.item_index(entry.item_id) for entry in found if entry.item_id != TWIN]
        half = len(known) // 2
        worth[name] = rates[known[:half]].mean() - rates[known[half:]].mean()
    assert worth["fused"] > worth["alone"]


def test_a_new_item_is_predicted_from_its_text(shop):
    if not set(shop.domain.event_columns) & set(shop.scorer.items.column_names):
        pytest.fail("the event takes nothing of the item")
    context = shop.asked["context"] or {}
    pair = [{"item_id": item, **context} for item in (shop.liked, TWIN)]
    for history in ([], shop.taste):
        liked, twin = shop.scorer.score(history, pair, shop.asked["user"])
        np.testing.assert_allclose(twin, liked, atol=1e-7)
    other = next(i for i in shop.log.items.column("item_id").to_pylist() if i != shop.liked)
    far = shop.scorer.score(shop.taste, [{"item_id": other, **context}], shop.asked["user"])[0]
    assert np.abs(far - twin).max() > 1e-5


def test_a_new_item_like_one_that_was_liked_is_reached(shop):
    found = shop.scorer.recommend(shop.taste, k=30, pool=30, **shop.asked)
    (twin,) = [entry for entry in found if entry.item_id == TWIN]
    assert twin.source in ("text", "fresh")
    retriever = shop.scorer.recommender().retriever
    ids = shop.scorer.items.ids()
    past, code = Histories.of([ids.index(shop.liked)]), ids.index(TWIN)
    assert retriever.source("fresh", past, 5)[0] == code
    assert retriever.source("text", past, 5, [ids.index(shop.liked)])[0] == code
    # Without any text in common it has no such place: here it is the one whose text is the farthest from the taste.
    order = retriever.source("text", past, len(ids))
    away = retriever.source("text", Histories.of([int(order[-1])]), len(ids))
    assert away.tolist().index(code) > len(ids) // 4


def test_a_taste_of_many_items_ranks_new_ones_by_it(shop):
    """A user's likes of one kind: a new item of that kind stands in the first tenth of all new and old ones."""
    retriever = shop.scorer.recommender().retriever
    ids = shop.scorer.items.ids()
    if len(ids) < 50:
        pytest.skip("too few items for a tenth")
    near = retriever.source("text", Histories.of([ids.index(shop.liked)]), 12)
    past = Histories.of([code for code in near.tolist() if ids[code] != TWIN][:8])
    assert retriever.source("text", past, len(ids)).tolist().index(ids.index(TWIN)) < len(ids) // 10
