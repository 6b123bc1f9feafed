"""Ranking metrics against scikit-learn and against every order of the ties."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from llmrec_peft.errors import DataError
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.evaluation.ranking_metrics import one_relevant


def candidates(seed=0, sets=30, grid=5):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, sets)
    ids = np.repeat(np.arange(sets), sizes)
    score = rng.integers(0, grid + 1, len(ids)) / grid
    return (rng.random(len(ids)) < 0.35).astype(int), np.column_stack([1 - score, score]), ids


def brute(y, score, k):
    """Means of NDCG@k, HR@k and MRR@k of one candidate set over all orders that keep falling scores."""
    best = sum(1 / np.log2(i + 2) for i in range(min(k, int(y.sum()))))
    found = []
    for order in itertools.permutations(range(len(y))):
        if any(score[a] < score[b] for a, b in itertools.pairwise(order)):
            continue
        gains = [int(y[i]) for i in order[:k]]
        dcg = sum(gain / np.log2(i + 2) for i, gain in enumerate(gains))
        found.append((dcg / best, float(any(gains)), 1 / (gains.index(1) + 1) if any(gains) else 0.0))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_equals_the_mean_over_all_orders_of_ties(k):
    y, p, ids = candidates()
    wanted = np.mean([brute(y[ids == i], p[ids == i, 1], k) for i in np.unique(ids) if y[ids == i].any()], axis=0)
    found = compute_metrics(y, p, candidate_sets=ids, names=[f"ndcg@{k}", f"hr@{k}", f"mrr@{k}"])
    assert list(found.values()) == pytest.approx(list(wanted), abs=1e-12)


def test_ndcg_matches_scikit_learn():
    y, p, ids = candidates(seed=5, sets=60)
    for k in (1, 3, 5):
        wanted = [
            ndcg_score([y[ids == i]], [p[ids == i, 1]], k=k)
            for i in np.unique(ids)
            if y[ids == i].any() and (ids == i).sum() > 1
        ]
        many = np.bincount(ids)[ids] > 1
        found = compute_metrics(y[many], p[many], candidate_sets=ids[many], names=[f"ndcg@{k}"])
        assert found[f"ndcg@{k}"] == pytest.approx(np.mean(wanted), abs=1e-12)


def test_candidate_sets_with_nothing_relevant_are_counted_and_left_out():
    y = [1, 0, 0, 0]
    p = np.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5], [0.6, 0.4]])
    names = ["hr@1", "lists", "lists_excluded"]
    assert compute_metrics(y, p, candidate_sets=["a", "a", "b", "b"], names=names) == {
        "hr@1": 1.0,
        "lists": 1,
        "lists_excluded": 1,
    }
    empty = compute_metrics([0, 0, 0, 0], p, candidate_sets=[0, 0, 1, 1], names=["ndcg@2", "hr@2", "mrr@2", "lists"])
    assert np.isnan([empty["ndcg@2"], empty["hr@2"], empty["mrr@2"]]).all() and empty["lists"] == 0


def test_a_constant_score_scores_as_chance_does():
    """Ten candidates, one relevant, all tied: row order must not matter, wherever the relevant one stands."""
    p = np.full((10, 2), 0.5)
    for place in (0, 9):
        y = np.eye(10, dtype=int)[place]
        found = compute_metrics(y, p, candidate_sets=np.zeros(10, int), names=["hr@3", "mrr@10"])
        assert found["hr@3"] == pytest.approx(0.3)
        assert found["mrr@10"] == pytest.approx(sum(1 / i for i in range(1, 11)) / 10)


def test_a_candidate_set_of_two_users_is_refused():
    p = np.full((2, 2), 0.5)
    with pytest.raises(DataError, match="a candidate set belongs to one user, but 1 of 2 rows do not: row 1 is 7"):
        compute_metrics([0, 1], p, ["a", "b"], candidate_sets=[7, 7], names=["hr@1"])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_one_relevant_item_is_scored_by_its_rank(k):
    """For every rank and tie, what the whole set gives."""
    pairs = [(above, tied) for above in range(13) for tied in range(1, 6)]
    scores, right, sets = [], [], []
    for number, (above, tied) in enumerate(pairs):
        scores += [0.9] * above + [0.5] * tied + [0.1] * 2
        right += [0] * above + [1] + [0] * (tied - 1) + [0, 0]
        sets += [number] * (above + tied + 2)
    p, right, sets = np.column_stack([1 - np.array(scores), scores]), np.array(right), np.array(sets)
    found = one_relevant(*np.array(pairs).T, k)
    assert list(found) == [f"ndcg@{k}", f"hr@{k}", f"mrr@{k}"]
    for number in range(len(pairs)):
        own = sets == number
        wanted = compute_metrics(right[own], p[own], candidate_sets=sets[own], names=list(found))
        assert {name: value[number] for name, value in found.items()} == pytest.approx(wanted, abs=1e-12)
