"""Quality of ranked candidate lists, as exact expectations over the order of tied scores.

A list is a set of candidates for one user at one moment. Models tie more often than one expects (two items with one
title, a saturated score), and a sort would then hand out the places by row order, which is an accident of the file. The
functions here return the mean over all orders of the ties, in closed form, after McSherry & Najork, "Computing
information retrieval performance measures efficiently in the presence of tied scores" (ECIR 2008).

All functions take the rows of a `RankedRows` and return one value a list; a list with nothing relevant gets NaN.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RankedRows:
    """Rows sorted by list and falling score, with the tie each row belongs to. Arrays are [rows] unless said."""

    list_of: np.ndarray  # list number of each row
    place: np.ndarray  # 0-based place in its list
    relevant: np.ndarray  # 0.0 or 1.0
    tie: np.ndarray  # tie number of each row
    tie_place: np.ndarray  # [ties] place of the tie's first row
    tie_size: np.ndarray  # [ties]
    tie_relevant: np.ndarray  # [ties] relevant rows in the tie
    tie_list: np.ndarray  # [ties] list of the tie
    list_relevant: np.ndarray  # [lists]


def rank_rows(scores: np.ndarray, relevant: np.ndarray, lists: np.ndarray) -> RankedRows:
    """Sort rows by list and falling score. `lists` holds codes 0 ... L-1, each of which occurs."""
    order = np.lexsort((-scores, lists))
    score, gain, list_of = scores[order], relevant[order].astype(np.float64), lists[order]
    new_list = np.r_[True, list_of[1:] != list_of[:-1]]
    starts = np.flatnonzero(new_list)
    place = np.arange(len(score)) - starts[list_of]
    new_tie = new_list | np.r_[True, score[1:] != score[:-1]]
    tie, tie_starts = np.cumsum(new_tie) - 1, np.flatnonzero(new_tie)
    return RankedRows(
        list_of=list_of,
        place=place,
        relevant=gain,
        tie=tie,
        tie_place=place[tie_starts],
        tie_size=np.diff(np.r_[tie_starts, len(score)]),
        tie_relevant=np.add.reduceat(gain, tie_starts),
        tie_list=list_of[tie_starts],
        list_relevant=np.add.reduceat(gain, starts),
    )


def ndcg(rows: RankedRows, k: int) -> np.ndarray:
    """NDCG@k with gain 1 for a relevant row: sum over places i < k of gain_i / log2(i + 2), over the best such sum."""
    discount = np.where(rows.place < k, 1.0 / np.log2(rows.place + 2.0), 0.0)
    # Over the orders of a tie, each of its places expects the tie's mean gain.
    expected = (rows.tie_relevant / rows.tie_size)[rows.tie]
    found = np.bincount(rows.list_of, expected * discount, len(rows.list_relevant))
    ideal = np.bincount(
        rows.list_of, np.where(rows.place < rows.list_relevant[rows.list_of], discount, 0.0), len(rows.list_relevant)
    )
    return np.divide(found, ideal, out=np.full(len(ideal), np.nan), where=rows.list_relevant > 0)


def hit_rate(rows: RankedRows, k: int) -> np.ndarray:
    """HR@k: the chance that at least one relevant row stands in the first k places."""
    slots = np.clip(k - rows.tie_place, 0, rows.tie_size)
    # Hypergeometric: no relevant row in `slots` draws without replacement from the tie.
    miss = np.exp(
        _log_choose(rows.tie_size - rows.tie_relevant, slots) - _log_choose(rows.tie_size, slots),
    )
    hit = np.where(_first_relevant_tie(rows), 1.0 - miss, 0.0)
    value = np.bincount(rows.tie_list, hit, len(rows.list_relevant))
    return np.where(rows.list_relevant > 0, value, np.nan)


def reciprocal_rank(rows: RankedRows, k: int) -> np.ndarray:
    """MRR@k: 1 / (place of the first relevant row, counted from 1), and 0 where it stands after place k."""
    first = _first_relevant_tie(rows)[rows.tie] & (rows.place < k)
    tie = rows.tie[first]
    size, relevant = rows.tie_size[tie], rows.tie_relevant[tie]
    offset = rows.place[first] - rows.tie_place[tie]
    # The first of `relevant` rows falls on this offset, and the others on the places behind it.
    chance = np.exp(_log_choose(size - offset - 1, relevant - 1) - _log_choose(size, relevant))
    value = np.bincount(rows.list_of[first], chance / (rows.place[first] + 1.0), len(rows.list_relevant))
    return np.where(rows.list_relevant > 0, value, np.nan)


def one_relevant(above: np.ndarray, tied: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """ndcg@k, hr@k and mrr@k, each [lists], of lists with one relevant item, from its place alone.

    above: int [lists], items that score higher. tied: int [lists], items that score as high, itself among them. The
    values are those of the functions above; such a list may be too long to be kept whole.
    """
    places = np.arange(k)
    first, last = np.minimum(above, k), np.minimum(above + tied, k)

    def mean(gains: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(gains)])
        return (sums[last] - sums[first]) / tied

    gains = {"ndcg": 1 / np.log2(places + 2), "hr": np.ones(k), "mrr": 1 / (places + 1)}
    return {f"{name}@{k}": mean(gain) for name, gain in gains.items()}


def _first_relevant_tie(rows: RankedRows) -> np.ndarray:
    """Mask [ties]: the first tie of its list that holds a relevant row."""
    before = np.cumsum(rows.tie_relevant) - rows.tie_relevant
    list_start = np.flatnonzero(rows.tie_place == 0)
    return (rows.tie_relevant > 0) & (before == before[list_start][rows.tie_list])


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """log of the binomial coefficient, -inf where k > n."""
    from scipy.special import gammaln  # takes half a second, and configurations import this module

    possible = k <= n
    n, k = np.where(possible, n, 0), np.where(possible, k, 0)
    return np.where(possible, gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0), -np.inf)
