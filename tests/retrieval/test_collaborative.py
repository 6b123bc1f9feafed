"""Collaborative models against plain loops; no future in them, and nothing of a user but the history."""

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.baselines import STRENGTH
from llmrec_peft.retrieval.collaborative import MODELS
from llmrec_peft.retrieval.collaborative_model import CollaborativeModel
from llmrec_peft.retrieval.cooccurrence import ItemCooccurrence
from llmrec_peft.retrieval.factor_models import LabelFactors, MatrixFactorisation
from llmrec_peft.retrieval.histories import Histories, feedback, user_items
from llmrec_peft.retrieval.item_codes import top_k
from llmrec_peft.retrieval.least_squares import FixedSide, Regularisation, als_item_vectors, half_step
from llmrec_peft.retrieval.popularity import DAY, Popularity
from llmrec_peft.retrieval.rates import UserItemRates

DOMAIN = Domain.from_dict(
    {
        "name": "small",
        "event": "{title}",
        "outcomes": {"dislike": " no\n", "like": " yes\n"},
        "label": {"column": "rating", "above": 3},
        "duplicates": "keep",  # every row of the small log, in whatever moment, is compared with loops
    }
)


def models() -> list:
    return [
        Popularity(half_life=10.0),
        Popularity(),
        ItemCooccurrence(neighbours=5, newest=8, shrink=2.0),
        MatrixFactorisation(rank=4, rounds=4),
        LabelFactors(rank=3, rounds=4),
        UserItemRates(),
    ]


ALL = pytest.mark.parametrize("model", models(), ids=lambda model: f"{model.NAME}")


@pytest.fixture
def log(small_log):
    return small_log(users=30, events=18)


@pytest.fixture
def labels(log):
    return feedback(log, DOMAIN)


@pytest.fixture
def train(log):
    return log.split().train.rows


def history(log, labels, user: int) -> Histories:
    rows = np.arange(log.user_offsets[user], log.user_offsets[user + 1])
    return Histories.of(log.item_codes[rows], labels[rows] == 1)


# ---- histories ------------------------------------------------------------------------------------------------------


def test_histories_before_are_strictly_earlier_labelled_rows_of_the_user(log, labels):
    labels = labels.copy()
    labels[::5] = -1
    users, moments = log.user_codes, log.timestamps
    found = Histories.before(log, labels, users, moments)
    shared = 0
    for row in range(len(log)):
        rows = [r for r in range(len(log)) if users[r] == users[row] and moments[r] < moments[row] and labels[r] >= 0]
        part = slice(found.offsets[row], found.offsets[row + 1])
        assert found.items[part].tolist() == log.item_codes[rows].tolist()
        assert found.positive[part].tolist() == (labels[rows] == 1).tolist()
        shared += sum(users[r] == users[row] and moments[r] == moments[row] and r != row for r in range(len(log)))
    assert shared  # rows of one moment are there, and none sees the other
    late = Histories.before(log, labels, users[:1], np.array([moments.max() + 1.5]))
    assert late.counts[0] == (labels[log.user_codes == users[0]] >= 0).sum()


def test_feedback_follows_the_domains_negative_class(log):
    assert (feedback(log, DOMAIN) == DOMAIN.classes(log)).all()
    content = DOMAIN.to_dict() | {"label": {"column": "behaviour", "map": {"click": "like", "skip": None}}}
    found = feedback(log, Domain.from_dict(content))
    clicks = np.array(log.column("behaviour").to_pylist()) == "click"
    assert (found == np.where(clicks, 1, -1)).all()
    content["negatives"] = {"per_positive": 0, "label": "like"}
    assert (feedback(log, Domain.from_dict(content))[clicks] == 0).all()


def test_matrix_holds_each_pair_once_and_any_positive_wins():
    items, positive = [3, 3, 1, 1, 0, 9, -1], [False, True, True, True, False, True, True]
    matrix = Histories.of(items, positive).matrix(5)
    assert matrix.indices.tolist() == [0, 1, 3] and matrix.data.tolist() == [0, 1, 1]


def test_parts_cover_all_users_within_the_limits():
    histories = Histories(np.array([0, 3, 3, 10, 11, 12]), np.arange(12), np.ones(12, bool))
    for events in (1, 3, 4, 20):
        for users in (1, 2, 9):
            cuts = histories.parts(events, users)
            assert [c[0] for c in cuts] == [0, *(c[1] for c in cuts[:-1])] and cuts[-1][1] == 5
            for start, stop in cuts:
                assert stop - start <= users
                assert stop - start == 1 or histories.offsets[stop] - histories.offsets[start] <= events
    assert Histories(np.array([0]), np.empty(0, int), np.empty(0, bool)).parts(3, 3) == []


def test_bad_histories_are_refused():
    with pytest.raises(DataError, match=r"item codes \[events\], got float64"):
        Histories.of([1.5])
    with pytest.raises(DataError, match="2 items needs as many labels"):
        Histories.of([1, 2], [True])


# ---- each model against a plain loop -------------------------------------------------------------------------------


def test_popularity_halves_by_age(log, labels, train):
    model = Popularity(half_life=5.0).fit(log, train, labels)
    now = log.timestamps[train].max()
    for item in range(log.num_items):
        rows = [r for r in train if log.item_codes[r] == item and labels[r] == 1]
        weight = sum(0.5 ** ((now - log.timestamps[r]) / (5 * DAY)) for r in rows)
        assert model.score(Histories.of(), [item])[0] == pytest.approx(np.log1p(weight), rel=1e-9)
    plain = Popularity().fit(log, train, labels)
    assert plain.arrays["weights"].sum() == (labels[train] == 1).sum()


def test_popularity_of_long_ago_still_counts():
    interactions = pa.table(
        {
            "user_id": ["a", "b"],
            "item_id": ["x", "y"],
            "title": ["x", "y"],
            "timestamp": [10**9, 2 * 10**9],
            "label": [1, 1],
        }
    )
    log = BehaviorLog(interactions)
    model = Popularity(half_life=0.01).fit(log, np.arange(2), np.ones(2, int))
    assert len(model.top(Histories.of(), 5)) == 2


def plain_similarity(log, rows, labels, shrink) -> np.ndarray:
    met = np.zeros((log.num_users, log.num_items))
    for row in rows:
        if labels[row] == 1:
            met[log.user_codes[row], log.item_codes[row]] = 1
    counts = met.sum(axis=0)
    similarity = met.T @ met / (np.sqrt(np.outer(counts, counts)) + shrink)
    np.fill_diagonal(similarity, 0)
    return similarity


@pytest.mark.parametrize("neighbours", [1, 4, 1000])
def test_cooccurrence_equals_a_dense_loop(log, labels, train, neighbours):
    model = ItemCooccurrence(neighbours=neighbours, shrink=3.0, newest=4).fit(log, train, labels)
    wanted = plain_similarity(log, train, labels, 3.0)
    for item in range(log.num_items):
        order = sorted(range(log.num_items), key=lambda other: (-wanted[item, other], other))
        wanted[item, [o for o in order[neighbours:]]] = 0
    assert model.similarities.toarray() == pytest.approx(wanted, abs=1e-6)
    for user in range(0, log.num_users, 5):
        past = history(log, labels, user)
        newest = list(dict.fromkeys(past.items[past.positive][::-1].tolist()))[:4]
        found = model.score(past, np.arange(log.num_items))
        assert found == pytest.approx(wanted[newest].sum(axis=0), abs=1e-6)


def test_cooccurrence_in_small_blocks_is_the_same(log, labels, train, monkeypatch):
    whole = ItemCooccurrence(neighbours=3).fit(log, train, labels)
    monkeypatch.setattr(CollaborativeModel, "BLOCK_SIZE", 40)
    parts = ItemCooccurrence(neighbours=3).fit(log, train, labels)
    assert all((whole.arrays[name] == parts.arrays[name]).all() for name in whole.arrays)
    past, candidates = history(log, labels, 3), np.arange(log.num_items)
    assert (whole.score(past, candidates) == parts.score(past, candidates)).all()


def test_cooccurrence_takes_the_newest_of_long_histories(log, labels, train):
    model = ItemCooccurrence(neighbours=1000, shrink=1.0, longest=2).fit(log, train, labels)
    kept = []
    for user in range(log.num_users):
        rows = [r for r in train if log.user_codes[r] == user and labels[r] == 1]
        newest = list(dict.fromkeys(log.item_codes[rows][::-1].tolist()))[:2]
        kept += [r for r in rows if log.item_codes[r] in newest]
    assert model.similarities.toarray() == pytest.approx(plain_similarity(log, kept, labels, 1.0))


def plain_half_step(matrix, met, other, background, strengths):
    rows = []
    for row in range(len(matrix)):
        gram = background * other.T @ other + strengths[row] * np.eye(other.shape[1])
        right = np.zeros(other.shape[1])
        for column in np.flatnonzero(met[row]):
            gram += np.outer(other[column], other[column])
            right += matrix[row, column] * other[column]
        rows.append(np.linalg.solve(gram, right) if met[row].any() else 0 * right)
    return np.array(rows)


@pytest.mark.parametrize("background", [0.0, 0.3])
@pytest.mark.parametrize("gathered", [10, 200, 4_000_000])
def test_half_step_solves_the_least_squares(background, gathered, monkeypatch):
    monkeypatch.setattr("llmrec_peft.retrieval.least_squares.BATCH_SIZE", gathered)
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 12, 90), rng.integers(0, 15, 90)
    users[users == 4] = 5  # user 4 met nothing
    sparse = user_items(users, items, rng.random(90) < 0.6, (12, 15))
    met = np.zeros((12, 15), bool)
    met[users, items] = True
    other = rng.normal(size=(15, 4)).astype(np.float32)
    penalty = Regularisation(background, 0.2)
    strengths = 0.2 * (met.sum(axis=1) + background * 15)
    wanted = plain_half_step(sparse.toarray(), met, other.astype(float), background, strengths)
    assert half_step(sparse, FixedSide(other), penalty) == pytest.approx(wanted, abs=1e-5)


def test_als_lowers_the_objective_each_round():
    rng = np.random.default_rng(1)
    users, items = rng.integers(0, 20, 150), rng.integers(0, 15, 150)
    matrix = user_items(users, items, np.ones(150, bool), (20, 15))
    dense, penalty = matrix.toarray(), Regularisation(0.2, 0.05)

    def objective(rounds: int) -> float:
        vectors = als_item_vectors(matrix, 3, rounds, penalty, seed=0)
        own = half_step(matrix, FixedSide(vectors), penalty)
        guess = own @ vectors.T
        fit = ((dense > 0) * (1 - guess) ** 2).sum() + 0.2 * (guess**2).sum()
        rows, columns = penalty.penalties((dense > 0).sum(axis=1), 15), penalty.penalties((dense > 0).sum(axis=0), 20)
        return fit + (rows * (own**2).sum(axis=1)).sum() + (columns * (vectors**2).sum(axis=1)).sum()

    values = [objective(rounds) for rounds in (1, 2, 4, 8, 16)]
    assert all(after < before for before, after in zip(values, values[1:], strict=False))


def test_items_that_nobody_met_change_no_vector():
    rng = np.random.default_rng(2)
    users, items = rng.integers(0, 20, 150), rng.integers(0, 15, 150)
    few, many = (user_items(users, items, np.ones(150, bool), (20, size)) for size in (15, 40))
    one, other = (als_item_vectors(matrix, 3, 2, Regularisation(0.2, 0.05), seed=0) for matrix in (few, many))
    assert other[:15] == pytest.approx(one, abs=1e-5) and not other[15:].any()


def test_a_folded_in_user_is_the_trained_user(log, labels, train):
    model = MatrixFactorisation(rank=4, rounds=3).fit(log, train, labels)
    taken = train[labels[train] == 1]
    matrix = user_items(
        log.user_codes[taken], log.item_codes[taken], np.ones(len(taken), bool), (log.num_users, log.num_items)
    )
    trained = half_step(matrix, FixedSide(model.arrays["factors"]), model._regularisation)
    for user in range(log.num_users):
        rows = train[log.user_codes[train] == user]
        past = Histories.of(log.item_codes[rows], labels[rows] == 1)
        assert model.fold_in(past)[0] == pytest.approx(trained[user], abs=1e-5)


def test_rates_equal_a_loop(log, labels, train):
    model = UserItemRates().fit(log, train, labels)
    overall = ((labels[train] == 1).sum() + STRENGTH / 2) / (len(train) + STRENGTH)

    def logit(positives, count):
        rate = (positives + STRENGTH * overall) / (count + STRENGTH)
        return np.log(rate / (1 - rate))

    past = history(log, labels, 2)
    user = logit(past.positive.sum(), len(past.items))
    for item in range(log.num_items):
        rows = train[log.item_codes[train] == item]
        wanted = logit((labels[rows] == 1).sum(), len(rows)) + user - logit(0, 0)
        assert model.score(past, [item])[0] == pytest.approx(wanted)
    assert model.user_logits(Histories.of())[0] == pytest.approx(logit(0, 0))


def test_label_factors_predict_taste_that_rates_cannot():
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(60), 20), rng.integers(0, 40, 1200)
    taste = np.where((users % 2) == (items % 2), 1, 0)  # all rates are about a half
    log = BehaviorLog(
        pa.table({"user_id": [f"u{u:02}" for u in users], "item_id": [f"i{i:02}" for i in items],
                  "title": ["t"] * 1200, "timestamp": np.arange(1200), "label": taste})
    )  # fmt: skip
    labels = log.column("label").to_numpy()
    model = LabelFactors(rank=2).fit(log, np.arange(1000), labels)
    held = np.arange(1000, 1200)
    past = Histories.before(log, labels, log.user_codes[held], log.timestamps[held])
    score = model.score_pairs(past, np.arange(200), log.item_codes[held].astype(int))
    known = past.counts >= 5
    assert (score[known & (labels[held] == 1)].min()) > score[known & (labels[held] == 0)].max()


# ---- what holds for all --------------------------------------------------------------------------------------------


@ALL
def test_top_is_the_best_of_score(log, labels, train, model):
    model.fit(log, train, labels)
    past = history(log, labels, 4)
    everything = np.asarray(model.score_all(past)[0], float)
    scores = model.score(past, np.arange(log.num_items))
    named = np.flatnonzero(everything > -np.inf)
    assert scores[named] == pytest.approx(everything[named], abs=1e-5)
    if isinstance(model, LabelFactors):
        assert not len(model.top(past, 5))
        return
    exclude = [named[0], named[-1], 999, -3, named[0]]
    order = sorted(set(named.tolist()) - set(exclude), key=lambda item: (-everything[item], item))
    assert model.top(past, 5, exclude).tolist() == order[:5]
    assert model.top(past, 10**6, exclude).tolist() == order
    assert len(model.top(past, 5, np.arange(log.num_items))) == 0 == len(model.top(past, 0))


@ALL
def test_pairs_are_scored_as_one_by_one(log, labels, train, model, monkeypatch):
    model.fit(log, train, labels)
    rows = np.arange(0, len(log), 3)
    past = Histories.before(log, labels, log.user_codes[rows], log.timestamps[rows])
    rng = np.random.default_rng(0)
    owners = rng.integers(0, len(rows), 400)
    candidates = rng.integers(-2, log.num_items + 3, 400)
    together = model.score_pairs(past, owners, candidates)
    single = [model.score(past.part(o, o + 1), [c])[0] for o, c in zip(owners.tolist(), candidates, strict=True)]
    assert together == pytest.approx(single, abs=1e-5)
    monkeypatch.setattr(CollaborativeModel, "BLOCK_SIZE", 60)
    assert model.score_pairs(past, owners, candidates) == pytest.approx(together, abs=1e-5)
    assert np.isfinite(together).all()


@ALL
def test_only_the_given_rows_are_learnt_from(log, labels, train, model):
    """Other labels, items and times after the training rows, and other users' unlabelled ones, change nothing."""
    model.fit(log, train, labels)
    before = {name: value.copy() for name, value in model.arrays.items()}
    late = np.setdiff1d(np.arange(len(log)), train)
    other = labels.copy()
    other[late] = 1 - other[late]
    log.item_codes[late] = log.item_codes[late][::-1]
    log.timestamps[late] = log.timestamps[late] + 10**6
    model.fit(log, train, other)
    assert all((model.arrays[name] == before[name]).all() for name in before)
    other[train[::2]] = -1
    model.fit(log, train, other)
    halved = {name: value.copy() for name, value in model.arrays.items()}
    model.fit(log, np.delete(train, np.arange(0, len(train), 2)), other)
    assert all((model.arrays[name] == halved[name]).all() for name in before)
    assert any(value.shape != before[name].shape or (value != before[name]).any() for name, value in halved.items())


@ALL
def test_a_new_user_and_a_new_item_get_the_neutral_score(log, labels, train, model):
    hidden = 5  # no training row has it
    rows = train[log.item_codes[train] != hidden]
    model.fit(log, rows, labels)
    past = history(log, labels, 1)
    assert hidden not in model.top(past, 10**6)
    neutral = model.score(past, [hidden, log.num_items + 7, -1])
    assert np.isfinite(neutral).all() and len(set(neutral.tolist())) == 1
    new = model.score(Histories.of(), np.arange(log.num_items))
    assert np.isfinite(new).all()
    unknown = Histories.of([log.num_items + 1, -1, hidden], [True, True, True])
    if not isinstance(model, UserItemRates):  # whose user rate counts labels, whatever the item
        assert model.score(unknown, np.arange(log.num_items)) == pytest.approx(new)
    tops = model.top(Histories.of(), 3)
    if isinstance(model, Popularity | UserItemRates):
        assert len(tops) == 3
    else:
        assert not len(tops) and not new.any()


@ALL
def test_repeats_in_a_history(log, labels, train, model):
    """A pair that a user repeats is one pair to co-occurrence and factors, and two events to rates."""
    model.fit(log, train, labels)
    candidates = np.arange(log.num_items)
    once, twice = Histories.of([1, 4, 9]), Histories.of([1, 1, 4, 9, 9])
    same = np.allclose(model.score(once, candidates), model.score(twice, candidates), atol=1e-6)
    assert same != isinstance(model, UserItemRates)


@ALL
def test_same_seed_same_model(log, labels, train, model):
    first = {name: value.copy() for name, value in model.fit(log, train, labels).arrays.items()}
    again = type(model)(**model.settings()).fit(log, train[::-1], labels)
    assert all((again.arrays[name] == first[name]).all() for name in first)
    if "seed" in model.settings():
        other = type(model)(**{**model.settings(), "seed": 5}).fit(log, train, labels)
        assert (other.arrays["factors"] != first["factors"]).any()


@ALL
def test_recoded_models_score_the_same_for_moved_items(log, labels, train, model):
    model.fit(log, train, labels)
    rng = np.random.default_rng(3)
    places = np.insert(np.delete(rng.permutation(log.num_items), 2), [0, 5], -1)  # two new items, one gone
    kept = np.flatnonzero(places >= 0)
    moved = model.recode(places)
    old = Histories.of([3, 9, 11, 9], [True, False, True, True])
    back = {old_code: new_code for new_code, old_code in enumerate(places.tolist()) if old_code >= 0}
    new = Histories.of([back.get(item, -1) for item in old.items.tolist()], old.positive)
    assert -1 not in new.items
    assert moved.score(new, kept) == pytest.approx(model.score(old, places[kept]), abs=1e-5)
    fresh = moved.score(new, np.flatnonzero(places < 0))
    assert fresh == pytest.approx(model.score(old, [-1, -1]), abs=1e-6)
    assert moved.has_valid_arrays(len(places)) and not moved.has_valid_arrays(len(places) + 1)


@ALL
def test_bad_rows_and_labels_are_refused(log, labels, train, model):
    with pytest.raises(DataError, match=rf"{model.NAME}: rows must be numbers from 0 to {len(log) - 1}"):
        model.fit(log, [len(log)], labels)
    with pytest.raises(DataError, match=rf"{model.NAME} needs labels 1, 0 or -1 of all {len(log)} rows"):
        model.fit(log, train, labels[:5])
    with pytest.raises(DataError, match=rf"{model.NAME} needs labels"):
        model.fit(log, train, labels * 2)
    for rows in ([], train[labels[train] == 0]):
        with pytest.raises(DataError, match=rf"{model.NAME} has no positive among {len(rows)} labelled rows"):
            model.fit(log, rows, labels)
    with pytest.raises(ConfigError, match="is not fitted; call fit"):
        type(model)().top(Histories.of(), 3)


def test_bad_settings_are_refused():
    for make in (
        lambda: Popularity(half_life=0),
        lambda: ItemCooccurrence(neighbours=0),
        lambda: ItemCooccurrence(shrink=-1.0),
        lambda: MatrixFactorisation(rank=0),
        lambda: MatrixFactorisation(background=0.0),
        lambda: LabelFactors(strength=float("nan")),
    ):
        with pytest.raises(ConfigError):
            make()
    assert len(MODELS) == 5


def test_best_takes_ties_by_the_lower_place():
    scores = np.array([1.0, 3.0, -np.inf, 3.0, 1.0, 1.0, 0.0])
    assert top_k(scores, 3).tolist() == [1, 3, 0]
    assert top_k(scores, 4).tolist() == [1, 3, 0, 4]
    assert top_k(scores, 99).tolist() == [1, 3, 0, 4, 5, 6]
    assert top_k(scores, 0).tolist() == top_k(np.full(3, -np.inf), 2).tolist() == []


def test_a_large_log_takes_memory_by_rows_and_not_by_users_times_items():
    """100,000 items and 50,000 users: a dense float32 matrix of both would be 20 GB."""
    import resource

    rng = np.random.default_rng(0)
    rows, users, items = 500_000, 50_000, 100_000
    code = np.minimum((rng.pareto(1.0, rows) * 50).astype(int), items - 1)
    table = pa.table({"user_id": pa.array(rng.integers(0, users, rows)).cast(pa.string()),
                      "item_id": pa.array(code).cast(pa.string()), "timestamp": np.arange(rows),
                      "label": np.ones(rows, int)})  # fmt: skip
    ids = pa.array(np.arange(items)).cast(pa.string())
    log = BehaviorLog(table, pa.table({"item_id": ids, "title": ids}))
    labels, before = np.ones(rows, int), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for model in (Popularity(), ItemCooccurrence(), MatrixFactorisation(rank=16, rounds=2), UserItemRates()):
        model.fit(log, np.arange(rows), labels)
        assert len(model.top(Histories.of([1, 2, 3]), 10)) == 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # KiB
