"""Small sets of combinations that stand in for a full matrix."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*factors: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Combinations, one value a factor, in which every pair of values of two factors occurs; always the same set.

    Greedy: each step takes the combination with the most pairs that do not occur yet, the first among equals.
    """
    rows = list(product(*(range(len(values)) for values in factors)))
    axes = list(combinations(range(len(factors)), 2))
    missing = {(a, b, row[a], row[b]) for row in rows for a, b in axes}
    chosen: list[tuple[int, ...]] = []
    while missing:
        best = max(rows, key=lambda row: sum((a, b, row[a], row[b]) in missing for a, b in axes))
        missing -= {(a, b, best[a], best[b]) for a, b in axes}
        chosen.append(best)
    return [tuple(values[index] for values, index in zip(factors, row, strict=True)) for row in sorted(chosen)]


def diagonal(first: tuple[Any, ...], second: tuple[Any, ...]) -> list[Any]:
    """All combinations of two factors as parameters of a test; slow but for a set in which every value occurs.

    For an equality of two factors that other tests hold at other levels too.
    """
    longest = max(len(first), len(second))
    chosen = {(n % len(first), n % len(second)) for n in range(longest)}
    pairs = product(range(len(first)), range(len(second)))
    return [pytest.param(first[a], second[b], marks=() if (a, b) in chosen else pytest.mark.slow) for a, b in pairs]
