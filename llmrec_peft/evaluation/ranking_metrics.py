"""Ranking metrics of candidate sets, as exact expectations over the order of tied scores.

A candidate set holds the candidates of one user at one moment. Models tie more often than one expects (two items with
one title, a saturated score). A sort would order tied candidates by their rows, which is an accident of the file. The
functions here return the mean over all orders of the ties, in closed form, after McSherry & Najork, "Computing
information retrieval performance measures efficiently in the presence of tied scores" (ECIR 2008).

All functions take a `RankedRows` and return one value a candidate set, NaN for a set with nothing relevant.

Shapes: r rows, t ties, L candidate sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec_peft.evaluation.metric_plans import Floats, UserSums
from llmrec_peft.evaluation.targets import Targets


@dataclass(frozen=True)
class RankedRows:
    """Rows sorted by candidate set and falling score, with the tie of each row. Arrays are [r] unless noted.

    Attributes:
        set_of: candidate set of each row.
        rank: 0-based rank in its set.
        relevant: 0.0 or 1.0.
        tie: tie number of each row.
        tie_rank: [t] rank of the tie's first row.
        tie_size: [t] rows of the tie.
        tie_relevant: [t] relevant rows of the tie.
        tie_set: [t] candidate set of the tie.
        set_relevant: [L] relevant rows of the set.
    """

    set_of: NDArray[np.int64]
    rank: NDArray[np.int64]
    relevant: Floats
    tie: NDArray[np.int64]
    tie_rank: NDArray[np.int64]
    tie_size: NDArray[np.int64]
    tie_relevant: Floats
    tie_set: NDArray[np.int64]
    set_relevant: Floats


SetMetric = Callable[[RankedRows, int], Floats]
"""Takes ranked rows and k, and returns a value [L] for each candidate set."""


def rank_rows(scores: np.ndarray, relevant: np.ndarray, candidate_sets: NDArray[np.int64]) -> RankedRows:
    """Sort rows by candidate set and falling score. `candidate_sets` has codes 0 ... L-1, each of which occurs."""
    order = np.lexsort((-scores, candidate_sets))  # by set, then falling score
    score, gain, set_of = scores[order], relevant[order].astype(np.float64), candidate_sets[order]
    new_set = np.r_[True, set_of[1:] != set_of[:-1]]
    starts = np.flatnonzero(new_set)
    rank = np.arange(len(score)) - starts[set_of]
    # A tie is a run of equal scores in one set; most have one row.
    new_tie = new_set | np.r_[True, score[1:] != score[:-1]]
    tie, tie_starts = np.cumsum(new_tie) - 1, np.flatnonzero(new_tie)
    return RankedRows(
        set_of=set_of,
        rank=rank,
        relevant=gain,
        tie=tie,
        tie_rank=rank[tie_starts],
        tie_size=np.diff(np.r_[tie_starts, len(score)]),
        tie_relevant=np.add.reduceat(gain, tie_starts),
        tie_set=set_of[tie_starts],
        set_relevant=np.add.reduceat(gain, starts),
    )


def candidate_set_sums(value: SetMetric) -> UserSums:
    """Sums by user [U, 3] of a metric of candidate sets: values, sets with something relevant, sets without."""

    def sums(targets: Targets, k: int) -> np.ndarray:
        assert targets.candidate_sets is not None  # `check_needs` has refused this
        last = targets.classes - 1
        rows = rank_rows(targets.probabilities[:, last], targets.labels == last, targets.candidate_sets)
        by_set = value(rows, k)
        used = ~np.isnan(by_set)
        # User of each set.
        owner = np.zeros(len(by_set), dtype=np.int64)
        owner[targets.candidate_sets] = targets.users
        columns = [np.where(used, by_set, 0.0), used, ~used]
        return np.stack([np.bincount(owner, column, targets.num_users) for column in columns], axis=1)

    return sums


def ndcg(rows: RankedRows, k: int) -> Floats:
    """NDCG@k = DCG@k / the best DCG@k, with DCG@k = sum over ranks i < k (from 0) of relevant_i / log2(i + 2)."""
    discount = np.where(rows.rank < k, 1.0 / np.log2(rows.rank + 2.0), 0.0)
    # Over the orders of a tie, each of its ranks expects the tie's mean relevance.
    expected = (rows.tie_relevant / rows.tie_size)[rows.tie]
    sets = len(rows.set_relevant)
    found = np.bincount(rows.set_of, expected * discount, sets)
    ideal = np.bincount(rows.set_of, np.where(rows.rank < rows.set_relevant[rows.set_of], discount, 0.0), sets)
    return np.divide(found, ideal, out=np.full(sets, np.nan), where=rows.set_relevant > 0)


def hit_rate(rows: RankedRows, k: int) -> Floats:
    """HR@k = chance that at least one of the first k rows is relevant."""
    slots = np.clip(k - rows.tie_rank, 0, rows.tie_size)
    # Hypergeometric: no relevant row in `slots` draws without replacement from the tie.
    miss = np.exp(
        _log_choose(rows.tie_size - rows.tie_relevant, slots) - _log_choose(rows.tie_size, slots),
    )
    hit = np.where(_first_relevant_tie(rows), 1.0 - miss, 0.0)
    value = np.bincount(rows.tie_set, hit, len(rows.set_relevant))
    return np.where(rows.set_relevant > 0, value, np.nan)


def reciprocal_rank(rows: RankedRows, k: int) -> Floats:
    """MRR@k = 1 / (rank of the first relevant row, from 1), and 0 where that rank is above k."""
    first = _first_relevant_tie(rows)[rows.tie] & (rows.rank < k)
    tie = rows.tie[first]
    size, relevant = rows.tie_size[tie], rows.tie_relevant[tie]
    offset = rows.rank[first] - rows.tie_rank[tie]
    # P(the first of `relevant` rows is at this offset): the others are among the ranks behind it.
    chance = np.exp(_log_choose(size - offset - 1, relevant - 1) - _log_choose(size, relevant))
    value = np.bincount(rows.set_of[first], chance / (rows.rank[first] + 1.0), len(rows.set_relevant))
    return np.where(rows.set_relevant > 0, value, np.nan)


def one_relevant(above: np.ndarray, tied: np.ndarray, k: int) -> dict[str, Floats]:
    """ndcg@k, hr@k and mrr@k, each [L], of sets with one relevant item, from its rank alone.

    The values are those of the functions above, for sets that are too large to be held in memory.

    Args:
        above: int [L], items that score higher.
        tied: int [L], items that score as high, itself among them.
    """
    # The item is at each of the ranks above ... above + tied - 1 with equal chance.
    ranks = np.arange(k)
    first, last = np.minimum(above, k), np.minimum(above + tied, k)

    def mean(gains: np.ndarray) -> Floats:
        sums = np.concatenate([[0.0], np.cumsum(gains)])
        return (sums[last] - sums[first]) / tied

    gains = {"ndcg": 1 / np.log2(ranks + 2), "hr": np.ones(k), "mrr": 1 / (ranks + 1)}
    return {f"{name}@{k}": mean(gain) for name, gain in gains.items()}


def _first_relevant_tie(rows: RankedRows) -> NDArray[np.bool_]:
    """Mask [t]: the first tie of its set that has a relevant row."""
    before = np.cumsum(rows.tie_relevant) - rows.tie_relevant
    set_start = np.flatnonzero(rows.tie_rank == 0)
    return (rows.tie_relevant > 0) & (before == before[set_start][rows.tie_set])


def _log_choose(n: np.ndarray, k: np.ndarray) -> Floats:
    """log of the binomial coefficient, -inf where k > n."""
    from scipy.special import gammaln  # takes half a second, and configurations import this module

    possible = k <= n
    n, k = np.where(possible, n, 0), np.where(possible, k, 0)
    return np.where(possible, gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0), -np.inf)
