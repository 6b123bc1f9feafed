"""Retrieval from merged sources, the index that it uses, and the index's files."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import BundleError, ConfigError, DataError
from llmrec_peft.retrieval.cooccurrence import ItemCooccurrence
from llmrec_peft.retrieval.factor_models import MatrixFactorisation
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.index_files import ARRAYS, FORMER_NAMES, MANIFEST
from llmrec_peft.retrieval.pair_features import Features
from llmrec_peft.retrieval.popularity import DAY, Popularity, choose_half_life
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.retrieval.retriever import QUOTAS, SOURCES, Retriever, _interleave, recall
from llmrec_peft.retrieval.text_neighbours import TextNeighbours

HIDDEN = 5  # an item without training rows


@pytest.fixture
def log(small_log):
    return small_log(users=30, events=18)


@pytest.fixture
def labels(log):
    return log.column("label").to_numpy().astype(np.int8)


@pytest.fixture
def train(log):
    rows = log.split().train.rows
    return rows[log.item_codes[rows] != HIDDEN]


@pytest.fixture
def retrieval_index(log, labels, train):
    return RetrievalIndex.fit(log, train, labels)


@pytest.fixture
def embeddings(log):
    """Items of one genre point the same way, beside a large part that all share; one item has none."""
    rng = np.random.default_rng(0)
    found = np.eye(3)[np.arange(log.num_items) % 3] + 0.05 * rng.normal(size=(log.num_items, 3)) + 8
    found[4] = 0
    return found.astype(np.float32)


PAST = Histories.of([3, 9, 11, 9, 6], [True, True, False, True, True])


# ---- merging --------------------------------------------------------------------------------------------------------


def test_interleave_gives_each_list_its_share_and_each_item_once():
    a, b, c = np.arange(0, 40), np.arange(100, 140), np.arange(200, 240)
    items, numbers = _interleave([a, b, c], [3, 2, 1])
    for size in (6, 12, 30):
        assert np.bincount(numbers[:size], minlength=3).tolist() == [size // 2, size // 3, size // 6]
    assert items[numbers == 1].tolist() == b.tolist()
    items, numbers = _interleave([np.array([1, 2, 3]), np.array([2, 9, 1])], [1, 1])
    assert items.tolist() == [1, 2, 9, 3] and numbers.tolist() == [0, 1, 1, 0]
    assert len(_interleave([], [])[0]) == len(_interleave([np.empty(0, int)], [1.0])[0]) == 0


def test_retrieve_excludes_fills_and_repeats_nothing(retrieval_index, embeddings, log):
    retriever = Retriever(retrieval_index, embeddings)
    exclude = [3, 9, 6, 6, -4, 9999]
    for k in (0, 1, 7, log.num_items - 3, 10**6):
        found = retriever.retrieve(PAST, k, exclude)
        assert len(found) == len(found.sources) == min(k, log.num_items - 3)
        assert len(set(found.items.tolist())) == len(found)
        assert not set(found.items.tolist()) & {3, 9, 6}
    again = retriever.retrieve(PAST, 10**6, exclude)
    assert (again.items == found.items).all() and (again.sources == found.sources).all()
    assert len(retriever.retrieve(PAST, 10, np.arange(log.num_items))) == 0
    with pytest.raises(ConfigError, match="k must be 0 or more, not -1"):
        retriever.retrieve(PAST, -1)


def test_a_single_source_is_that_source(retrieval_index, embeddings, log):
    for name in ("popularity", "cooccurrence", "factors", "text"):
        retriever = Retriever(retrieval_index, embeddings, {name: 1.0})
        alone = retriever.source(name, PAST, 6, [9])
        found = retriever.retrieve(PAST, 6, [9])
        assert found.items[: len(alone)].tolist() == alone.tolist()
        assert (found.sources[: len(alone)] == SOURCES.index(name)).all()
        assert (found.sources[len(alone) :] == len(SOURCES)).all()


def test_a_new_user_gets_what_is_popular(retrieval_index, embeddings):
    retriever = Retriever(retrieval_index, embeddings)
    found = retriever.retrieve(Histories.of(), 5)
    assert found.items.tolist() == retrieval_index.models["popularity"].top(Histories.of(), 5).tolist()
    only_dislikes = Histories.of([3, 9], [False, False])
    assert retriever.retrieve(only_dislikes, 5).items.tolist() == found.items.tolist()


def test_a_new_item_is_reached_by_its_text_or_as_fresh(retrieval_index, embeddings):
    """Item 5 has no training row; its genre is that of items 2, 8, 11."""
    past = Histories.of([2, 8, 11])
    near = Retriever(retrieval_index, embeddings, {**QUOTAS, "text": 3.0}).retrieve(past, 15, past.items)
    assert HIDDEN in near.items and near.sources[near.items.tolist().index(HIDDEN)] == SOURCES.index("text")
    blind = Retriever(retrieval_index)
    assert HIDDEN not in blind.retrieve(past, 12, past.items).items
    fresh = Retriever(retrieval_index, quotas={**QUOTAS, "text": 0, "fresh": 1.0})
    assert HIDDEN in fresh.retrieve(past, 12, past.items).items
    assert HIDDEN in fresh.retrieve(Histories.of(), 12).items
    assert HIDDEN not in fresh.retrieve(past, 12, [HIDDEN]).items


def test_fresh_items_come_by_taste_and_else_the_newest_first(retrieval_index, embeddings):
    grown = retrieval_index.for_items([*retrieval_index.item_ids.to_pylist(), "new-a", "new-b", "new-c"])
    more = np.vstack([embeddings, np.eye(3) + 8]).astype(np.float32)
    size = grown.num_items
    for retriever in (Retriever(grown, more), Retriever(grown)):
        assert retriever.source("fresh", Histories.of(), 9).tolist() == [size - 1, size - 2, size - 3, HIDDEN]
    order = Retriever(grown, more).source("fresh", Histories.of([0, 3, 6]), 9)
    assert order[0] == size - 3  # the first genre, as 0, 3 and 6


def test_quotas_that_cannot_be_are_refused(retrieval_index, embeddings):
    for quotas, message in (
        ({"popular": 1}, "there is no source 'popular'; use cooccurrence, factors"),
        ({"popularity": -1}, "share of popularity must be 0 or more, not -1"),
        ({"popularity": float("nan")}, "must be 0 or more, not nan"),
        ({"popularity": 0}, "no source has a share above 0"),
        ({"text": 1}, "source text has a share, but is not available"),
    ):
        with pytest.raises(ConfigError, match=message):
            Retriever(retrieval_index, quotas=quotas)
    assert Retriever(retrieval_index).quotas.keys() == QUOTAS.keys() - {"text"}


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("block", [5, 65_536])
def test_text_neighbours_equal_plain_cosines(embeddings, dtype, block, monkeypatch):
    monkeypatch.setattr("llmrec_peft.retrieval.text_neighbours.BLOCK", block)
    given = embeddings.astype(dtype)
    plain = given.astype(np.float64)
    has = plain.any(axis=1)
    plain = plain - plain[has].mean(axis=0)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    taste = plain[[3, 6, 9]].mean(axis=0)
    wanted = plain @ taste / np.linalg.norm(taste)
    text = TextNeighbours(given, len(given))
    found = text.scores(PAST)
    assert found[has] == pytest.approx(wanted[has], abs=1e-4) and (found[~has] == -np.inf).all()
    order = [i for i in np.lexsort((np.arange(len(found)), -found)) if has[i] and i not in (3, 6)]
    assert text.top(PAST, 5, [3, 6]).tolist() == order[:5]
    monkeypatch.setattr("llmrec_peft.retrieval.text_neighbours.NEWEST", 2)
    newest = plain[[9, 6]].mean(axis=0)
    assert text.scores(PAST)[has] == pytest.approx((plain @ newest / np.linalg.norm(newest))[has], abs=1e-4)


def test_text_without_a_taste_names_nothing(embeddings):
    text = TextNeighbours(embeddings, len(embeddings))
    for past in (Histories.of(), Histories.of([3], [False]), Histories.of([4]), Histories.of([999, -1])):
        assert text.scores(past) is None and not len(text.top(past, 5))
    alike = TextNeighbours(np.ones((6, 3), np.float32), 6)
    assert alike.scores(Histories.of([2])) is None


def test_embeddings_that_cannot_be_are_refused(retrieval_index, embeddings):
    for bad in (embeddings[:-1], embeddings[:, 0], embeddings.astype(int)):
        with pytest.raises(DataError, match=r"embeddings must be floats \[24 items, d\]"):
            Retriever(retrieval_index, bad)
    embeddings[3, 1] = np.nan
    with pytest.raises(DataError, match="embeddings of items 0 to 23 hold values that are not finite"):
        Retriever(retrieval_index, embeddings)


def test_recall_counts_each_relevant_item_once():
    assert recall([4, 2, 9, 7], [9, 7, 7, 1], 3) == pytest.approx(1 / 3)
    assert recall([4, 2], [], 3) != recall([4, 2], [], 3)
    assert recall([], [1], 3) == 0.0


# ---- index ----------------------------------------------------------------------------------------------------------


def test_features_are_those_of_strictly_earlier_events(log, labels, train, retrieval_index, monkeypatch):
    rows = np.setdiff1d(np.arange(len(log)), train)[::-1]
    found = retrieval_index.target_features(log, labels, rows)
    for place, row in enumerate(rows.tolist()):
        own = [r for r in range(len(log)) if log.user_codes[r] == log.user_codes[row]]
        past = [r for r in own if log.timestamps[r] < log.timestamps[row]]
        history = Histories.of(log.item_codes[past], labels[past] == 1)
        one = retrieval_index.features(history, np.array([0]), log.item_codes[[row]])
        assert found.values[place] == pytest.approx(one.values[0], abs=1e-5)
        assert found.values[place, -2] == pytest.approx(np.log1p(len(past)))
        assert found.values[place, -1] == pytest.approx(np.log1p((log.item_codes[train] == log.item_codes[row]).sum()))
    monkeypatch.setattr("llmrec_peft.retrieval.retrieval_index.EVENTS", 30)
    assert retrieval_index.target_features(log, labels, rows).values == pytest.approx(found.values, abs=1e-5)
    others = retrieval_index.target_features(log, labels, rows, np.full(len(rows), 7))
    assert (others.values[:, -1] == np.log1p((log.item_codes[train] == 7).sum())).all()


def test_the_present_and_the_future_are_in_no_feature(log, labels, train, retrieval_index):
    """Labels from the target's moment on, its own among them, can be anything."""
    moment = np.sort(log.timestamps)[int(len(log) * 0.9)]
    rows = np.flatnonzero(log.timestamps == moment)
    before = retrieval_index.target_features(log, labels, rows)
    late = log.timestamps >= moment
    flipped = np.where(late, 1 - labels, labels).astype(np.int8)
    again = RetrievalIndex.fit(log, train, flipped if not late[train].any() else labels)
    assert not late[train].any()
    assert (again.target_features(log, flipped, rows).values == before.values).all()
    changed = again.target_features(log, 1 - labels, rows)
    assert (changed.values != before.values).any()


def test_empty_targets_and_other_tables(log, labels, retrieval_index):
    assert retrieval_index.target_features(log, labels, np.empty(0, int)).values.shape == (
        0,
        len(retrieval_index.feature_names),
    )
    small = retrieval_index.for_items(retrieval_index.item_ids.to_pylist()[:5])
    with pytest.raises(DataError, match="has 24 items, the retrieval index 5; take index.for_items"):
        small.target_features(log, labels, np.arange(3))


def test_an_index_follows_the_item_table(retrieval_index):
    ids = retrieval_index.item_ids.to_pylist()
    moved = retrieval_index.for_items(["brand new", *ids[::-1]])
    assert retrieval_index.for_items(pa.chunked_array([ids])) is retrieval_index
    assert moved.item_rows.tolist() == [0, *retrieval_index.item_rows[::-1].tolist()]
    there = Histories.of(len(ids) - PAST.items, PAST.positive)
    zeros = np.zeros(len(ids), int)
    old = retrieval_index.features(PAST, zeros, np.arange(len(ids))).values
    new = moved.features(there, zeros, len(ids) - np.arange(len(ids))).values
    assert new == pytest.approx(old, abs=1e-4)
    plain, turned = Retriever(retrieval_index).retrieve(PAST, 8), Retriever(moved).retrieve(there, 8)
    assert set((len(ids) - turned.items).tolist()) == set(plain.items.tolist())


def test_logs_of_positives_have_no_label_factors(log, labels, train):
    only = np.where(labels == 1, 1, -1)
    assert set(RetrievalIndex.fit(log, train, only).models) == {"popularity", "cooccurrence", "factors", "rates"}
    with pytest.raises(ConfigError, match="different names"):
        RetrievalIndex.fit(log, train, labels, [Popularity(), Popularity(3.0)])


@pytest.mark.parametrize(("drift", "wanted"), [(True, 7.0), (False, None)])
def test_half_life_follows_the_log(drift, wanted):
    rng = np.random.default_rng(0)
    days = np.sort(rng.uniform(0, 200, 4000))
    items = (days / 10 if drift else rng.zipf(1.5, 4000) % 20).astype(int) + (rng.random(4000) < 0.2)
    table = pa.table({"user_id": [f"u{n % 90}" for n in range(4000)], "item_id": [f"i{i}" for i in items],
                      "title": ["t"] * 4000, "timestamp": days * DAY, "label": [1] * 4000})  # fmt: skip
    log = BehaviorLog(table)
    found = choose_half_life(log, np.arange(len(log)), np.ones(len(log), int))
    assert found == wanted if drift else found in (365.0, 1460.0, None)
    assert choose_half_life(log, np.arange(0), np.ones(len(log), int)) is None


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fusion(retrieval_index, log, labels):
    rows = np.arange(len(log))
    logits = np.random.default_rng(0).normal(size=(len(log), 2))
    return Fusion.fit(logits, retrieval_index.target_features(log, labels, rows), labels[rows], log.user_codes[rows])


def test_a_saved_index_retrieves_the_same(retrieval_index, fusion, embeddings, log, labels, tmp_path):
    assert fusion.strength is not None
    place = retrieval_index.save(tmp_path / "retrieval", fusion=fusion, adapter="a" * 64)
    assert sorted(path.name for path in place.iterdir()) == [MANIFEST, ARRAYS]
    loaded, found = RetrievalIndex.load(place, adapter="a" * 64)
    assert found == fusion and loaded.item_ids.equals(retrieval_index.item_ids) and loaded.note == retrieval_index.note
    rows = np.arange(0, len(log), 4)
    assert (
        loaded.target_features(log, labels, rows).values == retrieval_index.target_features(log, labels, rows).values
    ).all()
    for name, model in retrieval_index.models.items():
        assert loaded.models[name].settings() == model.settings()
        assert all((loaded.models[name].arrays[key] == value).all() for key, value in model.arrays.items())
    one, two = (Retriever(e, embeddings).retrieve(PAST, 15) for e in (retrieval_index, loaded))
    assert (one.items == two.items).all() and (one.sources == two.sources).all()
    retrieval_index.save(place)
    assert RetrievalIndex.load(place)[1] is None
    assert [path.name for path in tmp_path.iterdir()] == ["retrieval"]


def test_item_ids_of_any_text_survive(tmp_path):
    ids = ["ü", "ж 日本 \U0001f3ac", "a\x00b", "a"]
    table = pa.table(
        {"user_id": ["u"] * 4, "item_id": ids, "title": ["t"] * 4, "timestamp": range(4), "label": [1] * 4}
    )
    log = BehaviorLog(table)
    retrieval_index = RetrievalIndex.fit(log, np.arange(4), np.ones(4, int), [Popularity()])
    retrieval_index.save(tmp_path / "r")
    assert RetrievalIndex.load(tmp_path / "r")[0].item_ids.to_pylist() == retrieval_index.item_ids.to_pylist()


def test_another_adapter_is_refused_for_its_fusion_alone(retrieval_index, fusion, tmp_path):
    retrieval_index.save(tmp_path / "r", fusion=fusion, adapter="a" * 64)
    with pytest.raises(BundleError, match="fitted with adapter weights aaaaaaaaaaaaaaaa..., and these are bbbb"):
        RetrievalIndex.load(tmp_path / "r", adapter="b" * 64)
    retrieval_index.save(tmp_path / "r", adapter="a" * 64)
    RetrievalIndex.load(tmp_path / "r", adapter="b" * 64)


def edit(place, change):
    manifest = json.loads((place / MANIFEST).read_text())
    change(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))


def rewrite(place, change):
    """New arrays with digests that are right, as one who knows the format could forge them."""
    from safetensors.numpy import load_file, save_file

    from llmrec_peft.checkpoints.checksum import digest, sha256

    tensors = load_file(place / ARRAYS)
    manifest = json.loads((place / MANIFEST).read_text())
    change(tensors, manifest)
    manifest.pop("files")
    save_file(tensors, place / ARRAYS, metadata={"manifest_sha256": digest(manifest)})
    manifest["files"] = {ARRAYS: sha256(place / ARRAYS)}
    (place / MANIFEST).write_text(json.dumps(manifest))


def flip(place):
    data = bytearray((place / ARRAYS).read_bytes())
    data[-9] ^= 1
    (place / ARRAYS).write_bytes(data)


def cut(place):
    (place / ARRAYS).write_bytes((place / ARRAYS).read_bytes()[:-50])


DAMAGE = [
    (flip, "is not the file that index.json was written with"),
    (cut, "is not the file that index.json was written with"),
    (lambda p: (p / ARRAYS).unlink(), "has no file index.safetensors"),
    (lambda p: (p / MANIFEST).write_text("{"), "is not readable JSON"),
    (lambda p: (p / "extra.npz").write_bytes(b"x"), "holds extra.npz, which RetrievalIndex.save does not write"),
    (lambda p: edit(p, lambda m: m.update(format_version=2)), "has format_version 2, and this version reads 1"),
    (lambda p: edit(p, lambda m: m.pop("fusion")), "has no valid entry 'fusion'"),
    (lambda p: edit(p, lambda m: m["fitted"].update(rows=1)), "was changed after it was written"),
    (lambda p: edit(p, lambda m: m["fusion"].update(bias=9.0)), "was changed after it was written"),
    (lambda p: edit(p, lambda m: m["models"]["factors"].update(seed=9)), "was changed after it was written"),
    (lambda p: rewrite(p, lambda t, m: m["models"]["factors"].update(rank=0)), "settings that this version does not"),
    (lambda p: rewrite(p, lambda t, m: m["models"].update(magic={})), "model 'magic' with settings that this version"),
    (lambda p: rewrite(p, lambda t, m: t.pop("factors.gram")), "the arrays are not those of its models"),
    (lambda p: rewrite(p, lambda t, m: t.update(extra=np.zeros(3))), "the arrays are not those of its models"),
    (lambda p: rewrite(p, lambda t, m: t["factors.factors"].fill(np.nan)), "model 'factors' do not fit 24 items"),
    (lambda p: rewrite(p, lambda t, m: m["models"]["factors"].update(rank=8)), "model 'factors' do not fit 24 items"),
    (lambda p: rewrite(p, lambda t, m: t["cooccurrence.near"].fill(24)), "model 'cooccurrence' do not fit 24 items"),
    (lambda p: rewrite(p, lambda t, m: t.update(item_id_ends=t["item_id_ends"][1:])), "23 item ids for 24 items"),
    (lambda p: rewrite(p, lambda t, m: m["fusion"].update(weights=[])), "fusion is not what Fusion.to_dict writes"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_files_are_refused(retrieval_index, fusion, tmp_path, damage, message):
    place = retrieval_index.save(tmp_path / "retrieval", fusion=fusion)
    damage(place)
    with pytest.raises(BundleError, match=message):
        RetrievalIndex.load(place)


def test_nothing_else_is_overwritten_and_other_features_are_not_saved(
    retrieval_index, fusion, log, labels, train, tmp_path
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(BundleError, match="exists and holds no retrieval index, so it is not replaced"):
        retrieval_index.save(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    fewer = RetrievalIndex.fit(log, train, labels, [ItemCooccurrence(), MatrixFactorisation(rank=2, rounds=1)])
    with pytest.raises(DataError, match="fusion has the features popularity"):
        fewer.save(tmp_path / "r", fusion=fusion)
    assert not (tmp_path / "r").exists()
    assert isinstance(fewer.features(PAST, np.array([0]), np.array([1])), Features)


def test_the_names_of_version_0_1_0_are_read_and_replaced(retrieval_index, fusion, tmp_path):
    place = retrieval_index.save(tmp_path / "retrieval", fusion=fusion)
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"] = {FORMER_NAMES[1]: manifest["files"][ARRAYS]}
    (place / FORMER_NAMES[0]).write_text(json.dumps(manifest))
    (place / ARRAYS).rename(place / FORMER_NAMES[1])
    (place / MANIFEST).unlink()
    loaded, found = RetrievalIndex.load(place)
    assert found == fusion and loaded.item_ids.equals(retrieval_index.item_ids)
    loaded.save(place)
    assert sorted(path.name for path in place.iterdir()) == [MANIFEST, ARRAYS]


def test_retrieval_imports_neither_torch_nor_transformers():
    code = """
import importlib, pkgutil, sys
import llmrec_peft.retrieval as package
for module in pkgutil.iter_modules(package.__path__, "llmrec_peft.retrieval."):
    if not module.name.endswith(".recommender"):
        importlib.import_module(module.name)
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
