"""Item codes: which ones a table has, rows of item arrays, and the codes of the highest scores.

An item's code is its row in the item table, 0 ... num_items - 1. Any other number stands for an unknown item.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Codes = NDArray[np.int64]


def is_known(codes: Codes, num_items: int) -> NDArray[np.bool_]:
    """Whether each code is a row of a table of `num_items` items, bool [n]."""
    return (codes >= 0) & (codes < num_items)


def known_codes(codes: ArrayLike, num_items: int) -> Codes:
    """The codes that a table of `num_items` items has, int64 [at most n], in the order given."""
    flat = np.asarray(codes, np.int64).ravel()
    return flat[is_known(flat, num_items)]


def rows_at(values: np.ndarray, codes: Codes) -> np.ndarray:
    """Rows [n, ...] of an item array [num_items, ...] at the codes [n]; zeros for unknown items."""
    known = is_known(codes, len(values))
    result = np.zeros((len(codes), *values.shape[1:]), values.dtype)
    result[known] = values[codes[known]]
    return result


def top_k(scores: np.ndarray, k: int) -> Codes:
    """Codes int64 [at most k] of the highest of scores [num_items], best first; ties go to the lower code.

    Items of score -inf are never returned. A partition finds the k-th score, so the whole is O(num_items + k log k).
    """
    k = min(k, int((scores > -np.inf).sum()))
    if k <= 0:
        return np.empty(0, np.int64)
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > threshold)
    level = np.flatnonzero(scores == threshold)[: k - len(above)]
    codes = np.concatenate([above, level])
    return codes[np.lexsort((codes, -scores[codes]))]
