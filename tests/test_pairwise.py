"""The small sets of combinations hold what they stand for."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.support.pairwise import diagonal, pairwise


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (4, 5, 2, 2), (3, 3, 3, 3), (5, 4, 3, 2, 2)])
def test_every_pair_of_values_occurs(sizes):
    factors = [tuple(f"{name}{n}" for n in range(size)) for name, size in zip("abcde", sizes, strict=False)]
    chosen = pairwise(*factors)
    for a, b in combinations(range(len(factors)), 2):
        assert {(row[a], row[b]) for row in chosen} == set(product(factors[a], factors[b]))
    assert chosen == pairwise(*factors) and len(set(chosen)) == len(chosen)
    assert len(chosen) <= 2 * max(a * b for a, b in combinations((*sizes, 1), 2))


@pytest.mark.parametrize(("first", "second"), [("abc", "xy"), ("ab", "vwxyz"), ("abc", "xyz")])
def test_every_value_is_in_the_diagonal(first, second):
    parameters = diagonal(tuple(first), tuple(second))
    assert [entry.values for entry in parameters] == list(product(first, second))
    quick = [entry.values for entry in parameters if not entry.marks]
    assert {a for a, _ in quick} == set(first) and {b for _, b in quick} == set(second)
    assert len(quick) == max(len(first), len(second))
