"""Recommending: who is ranked, who is left out, and that every probability is the scorer's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft import Scorer
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.recommender import Recommender
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from tests.support.requests import CALIBRATION, HISTORY, SHOP, SHOP_HISTORY, USER

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's own call
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

HIDDEN = "i23"  # an item without training rows
MET = {item for item, _ in HISTORY}


@pytest.fixture
def scorer(bundle_of, items) -> Scorer:
    return Scorer.load(bundle_of(calibration=CALIBRATION), items)


@pytest.fixture
def fitted(small_log):
    """A log, the feedback of its rows, and the retrieval index of all rows but those of HIDDEN."""
    log = small_log(users=30, events=18)
    feedback = log.column("label").to_numpy().astype(np.int8)
    rows = np.flatnonzero(log.item_codes != log.item_index(HIDDEN))
    return log, feedback, RetrievalIndex.fit(log, rows, feedback)


@pytest.fixture
def fusion(fitted) -> Fusion:
    """A fusion that moves the answers."""
    log, feedback, retrieval_index = fitted
    rng = np.random.default_rng(0)
    rows = np.arange(len(log))
    logits = 0.1 * rng.normal(size=(len(rows), 2))
    found = Fusion.fit(logits, retrieval_index.target_features(log, feedback, rows), feedback, log.user_codes)
    return dataclasses.replace(found, strength=1.0, bias=0.3, weights=tuple(0.3 * rng.normal(size=len(found.weights))))


def by_item(found) -> dict[str, tuple[float, ...]]:
    assert len({entry.item_id for entry in found}) == len(found)
    return {entry.item_id: entry.probabilities for entry in found}


def same(left, right) -> None:
    assert [(a.item_id, a.source) for a in left] == [(b.item_id, b.source) for b in right]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose((a.score, *a.probabilities), (b.score, *b.probabilities), atol=1e-5)


def with_exclude(domains, labels) -> None:
    rule = dataclasses.replace(domains["movies"].recommend, exclude=labels)
    domains["movies"] = dataclasses.replace(domains["movies"], recommend=rule)


# -- the whole catalogue -----------------------------------------------------------------------


def test_without_an_index_the_whole_catalogue_is_ranked(scorer, items):
    found = scorer.recommend(HISTORY, k=100)
    left = [item for item in items.column("item_id").to_pylist() if item not in MET]
    assert set(by_item(found)) == set(left) and {entry.source for entry in found} == {"all"}
    scores = [entry.score for entry in found]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 10
    np.testing.assert_allclose([by_item(found)[item] for item in left], scorer.score(HISTORY, left), atol=1e-6)
    assert all(entry.score == pytest.approx(entry.probabilities[1]) for entry in found)
    same(scorer.recommend(HISTORY, k=3), found[:3])


@pytest.mark.parametrize("labels", [None, ["like"], []])
def test_the_domain_sets_the_exclusions(labels, bundle_of, domains, items):
    with_exclude(domains, labels)
    found = by_item(Scorer.load(bundle_of(), items).recommend(HISTORY, k=100))
    out = {item for item, label in HISTORY if labels is None or label in labels}
    assert set(found) == set(items.column("item_id").to_pylist()) - out


def test_more_may_be_excluded(scorer):
    all_of_them = scorer.recommend(HISTORY, k=100)
    found = scorer.recommend(HISTORY, k=100, exclude=["i7", "i7", "i3", all_of_them[0].item_id])
    assert set(by_item(found)) == set(by_item(all_of_them)) - {"i7", all_of_them[0].item_id}
    everything = [entry.item_id for entry in all_of_them]
    assert scorer.recommend(HISTORY, exclude=everything) == []


def test_a_new_user(scorer, items):
    found = by_item(scorer.recommend([], k=100))
    ids = items.column("item_id").to_pylist()
    assert set(found) == set(ids)
    np.testing.assert_allclose([found[item] for item in ids], scorer.score([], ids), atol=1e-6)


def test_given_candidates_are_ranked_and_no_others(scorer):
    given = ["i9", "i3", "i12", "i9", "i15"]  # i3 is in the history, i9 stands twice
    found = scorer.recommend(HISTORY, candidates=given)
    assert set(by_item(found)) == {"i9", "i12", "i15"} and {entry.source for entry in found} == {"given"}
    assert scorer.recommend(HISTORY, candidates=[]) == []
    same(scorer.recommend(HISTORY, candidates=np.array(given)), found)


def test_a_history_may_name_what_the_table_lacks(scorer, items):
    unknown = [({"title": "A film of no table", "genres": "Drama"}, "like"), ({"item_id": "i5"}, "like")]
    found = scorer.recommend(unknown, k=100)
    assert set(by_item(found)) == set(items.column("item_id").to_pylist()) - {"i5"}


# -- retrieval ---------------------------------------------------------------------------------


def test_retrieval_names_the_pool(scorer, fitted):
    scorer.retrieval_index = fitted[2]
    found = scorer.recommend(HISTORY, k=4, pool=8)
    assert len(found) == 4 and not set(by_item(found)) & MET
    pool = scorer.recommender().retriever.retrieve(
        Histories.of([3, 4, 5, 0, 6], [True, False, True, True, False]), 8, [3, 4, 5, 0, 6]
    )
    named = [f"i{code}" for code in pool.items]
    best = np.argsort(-scorer.score(HISTORY, named)[:, 1], kind="stable")[:4]
    assert [entry.item_id for entry in found] == [named[n] for n in best]
    assert {entry.source for entry in found} <= {"cooccurrence", "factors", "popularity", "fill"}
    # k asks for more than the pool, and for more than there is.
    assert len(scorer.recommend(HISTORY, k=12, pool=2)) == 12
    assert len(scorer.recommend(HISTORY, k=10_000, pool=2)) == 24 - len(MET)
    assert len(scorer.recommend([], k=5, pool=5)) == 5


def test_a_new_item_is_reached_by_a_quota_and_scored_by_its_text(scorer, fitted, items):
    """Its place in the table is another than in the log that the index is of, and it has no row there."""
    order = [*range(23, 12, -1), *range(13)]
    new = pa.table({"item_id": ["brand new"], "title": ["A film nobody met"], "genres": ["Comedy"]})
    table = pa.concat_tables([items.take(order), new], promote_options="permissive")
    scorer = Scorer.load(scorer._bank.pin(scorer._name).adapter.directory, table)
    quotas = {"popularity": 1.0, "fresh": 1.0}
    recommender = Recommender(scorer, fitted[2], quotas=quotas)
    found = recommender.recommend(HISTORY, k=6, pool=6)
    entry = next(entry for entry in found if entry.item_id == "brand new")
    assert entry.source == "fresh" and {entry.source for entry in found} == {"popularity", "fresh"}
    by_text = scorer.score(HISTORY, [{"title": "A film nobody met", "genres": "Comedy"}])
    np.testing.assert_allclose(entry.probabilities, by_text[0], atol=1e-6)
    usual = Recommender(scorer, fitted[2]).recommend(HISTORY, k=6, pool=6)
    assert "brand new" not in by_item(usual)


def test_fusion_is_applied_to_the_scorers_predictions(scorer, fitted, fusion):
    log, _, retrieval_index = fitted
    scorer.retrieval_index = retrieval_index
    alone = by_item(scorer.recommend(HISTORY, k=24, pool=24))
    scorer.fusion = fusion
    fused = scorer.recommend(HISTORY, k=24, pool=24)
    ids = list(alone)
    codes = np.array([log.item_index(item) for item in ids])
    past = Histories.of([3, 4, 5, 0, 6], [True, False, True, True, False])
    features = retrieval_index.features(past, np.zeros(len(ids), np.int64), codes)
    expected = fusion.apply(np.log(scorer.score(HISTORY, ids)), features)
    np.testing.assert_allclose([by_item(fused)[item] for item in ids], expected, atol=1e-6)
    assert np.abs(expected - np.array(list(alone.values()))).max() > 0.05
    assert [entry.score for entry in fused] == sorted((entry.score for entry in fused), reverse=True)
    # Given candidates are fused as well.
    given = scorer.recommend(HISTORY, candidates=ids[:3])
    for item, probabilities in by_item(given).items():
        np.testing.assert_allclose(probabilities, by_item(fused)[item], atol=1e-6)


# -- many at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["nothing", "index", "fusion", "candidates"])
def test_many_users_get_the_same_as_one_by_one(parts, scorer, fitted, fusion):
    options = {"k": 7, "pool": 9 if parts != "fusion" else 3, "exclude": ["i9"]}
    if parts in ("index", "fusion"):
        scorer.retrieval_index = fitted[2]
    if parts == "fusion":
        scorer.fusion = fusion
    if parts == "candidates":
        options["candidates"] = [f"i{n}" for n in range(4, 16)]
    flipped = [(item, "like" if label == "dislike" else "dislike") for item, label in HISTORY]
    histories = [HISTORY, [], HISTORY[:3], HISTORY, flipped, [], HISTORY[2:]]
    many = scorer.recommender().recommend_many(histories, **options)
    assert len(many) == len(histories) and scorer.recommender().recommend_many([]) == []
    for found, history in zip(many, histories, strict=True):
        same(found, scorer.recommend(history, **options))
    same(many[0], many[3])


def test_the_same_users_are_computed_once(bundle_of, items, monkeypatch):
    scorer = Scorer.load(bundle_of(), items, cache_bytes=0)
    tokens = []
    classifier = scorer._bank._engine.classifier
    run = classifier.hidden_states

    def counted(input_ids, *args, **kwargs):
        tokens.append(input_ids.numel())
        return run(input_ids, *args, **kwargs)

    monkeypatch.setattr(classifier, "hidden_states", counted)
    recommender = scorer.recommender()
    recommender.recommend_many([HISTORY, []])
    two = sum(tokens)
    tokens.clear()
    recommender.recommend_many([HISTORY, [], HISTORY, [], [], HISTORY])
    assert sum(tokens) == two


def test_columns_of_users_and_of_the_moment(bundle_of):
    table = pa.table({"item_id": [f"s{n}" for n in range(5)], "title": [entry["title"] for entry in SHOP]})
    scorer = Scorer.load(bundle_of("lora", "shop"), table)
    history = [*SHOP_HISTORY, ({"item_id": "s1", "price": 2.0}, "buy")]
    users, contexts = [USER, {"age": 71}], [{"price": 7.5}, {"price": 90.0, "item_id": "s0"}]
    many = scorer.recommender().recommend_many([history, history], users=users, contexts=contexts)
    for found, user, context in zip(many, users, contexts, strict=True):
        same(found, scorer.recommend(history, user=user, context=context))
        events = [{"item_id": entry.item_id, "price": context["price"]} for entry in found]
        expected = scorer.score(history, events, user)
        np.testing.assert_allclose([entry.probabilities for entry in found], expected, atol=1e-6)
        np.testing.assert_allclose([entry.score for entry in found], 1 - expected[:, 0], atol=1e-6)
        assert {entry.item_id for entry in found} == {"s0", "s2", "s3", "s4"}
    assert np.abs(many[0][0].score - many[1][0].score) > 1e-6
    with pytest.raises(DataError, match="request 1: user lacks age"):
        scorer.recommender().recommend_many([history, history], users=[USER, None], contexts=contexts)
    with pytest.raises(DataError, match="users has 1 entries for 2 histories"):
        scorer.recommender().recommend_many([history, history], users=[USER])
    with pytest.raises(DataError, match="has no column price, which the template of domain 'shop' names"):
        scorer.recommend(history, user=USER)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([("i3", "adored")], "label 'adored'"),
        ([("i3", ["like"])], r"label \['like'\]"),
        ([("zz", "like")], "item 'zz' is unknown"),
        (["i3"], r"entry 0 must be a pair \(event, label\), not 'i3'"),
        ([("i3", "like", 1)], "entry 0 must be a pair"),
        ("i3", "history must be a list, not 'i3'"),
        (None, "history must be a list, not None"),
        ([(3.5, "like")], "entry 0 must be an item id or a mapping"),
    ],
)
def test_a_bad_history_is_named(history, message, scorer):
    with pytest.raises(DataError, match=message):
        scorer.recommend(history)
    with pytest.raises(DataError, match=f"request 1: .*{message}"):
        scorer.recommender().recommend_many([HISTORY, history])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["i3", "zz"]}, "candidates: item 'zz' is unknown among the 24 items"),
        ({"candidates": "i3"}, "candidates must be a list, not 'i3'"),
        ({"candidates": [{"title": "x"}]}, "candidates must be a list of item ids, and has {'title': 'x'}"),
        ({"exclude": ["zz"]}, "exclude: item 'zz' is unknown"),
        ({"exclude": None}, "exclude must be a list, not None"),
        ({"k": 0}, "k and pool must be at least 1, not 0 and 100"),
        ({"pool": -1}, "k and pool must be at least 1, not 10 and -1"),
    ],
)
def test_bad_options_are_named(options, message, scorer):
    for call in (lambda: scorer.recommend(HISTORY, **options),
                 lambda: scorer.recommender().recommend_many([HISTORY], **options)):  # fmt: skip
        with pytest.raises((DataError, ConfigError), match=message):
            call()


def test_what_cannot_recommend_is_refused(bundle_of, items):
    with pytest.raises(DataError, match="needs an item table"):
        Scorer.load(bundle_of()).recommend(HISTORY)
    with pytest.raises(ConfigError, match="quotas and embeddings are for retrieval"):
        Recommender(Scorer.load(bundle_of(), items), quotas={"fresh": 1.0})


def test_a_scorer_takes_the_retrieval_inside_its_bundle(bundle_of, fitted, fusion):
    log, _, retrieval_index = fitted
    directory = bundle_of()
    retrieval_index.save(directory / "retrieval", fusion=fusion)
    scorer = Scorer.load(directory, BehaviorLog(log.interactions, log.items, name="again"))
    assert scorer.retrieval_index is not None and scorer.fusion == fusion
    by_hand = Scorer.load(directory, log.items)
    by_hand.retrieval_index, by_hand.fusion = retrieval_index, fusion
    same(scorer.recommend(HISTORY, pool=10), by_hand.recommend(HISTORY, pool=10))
