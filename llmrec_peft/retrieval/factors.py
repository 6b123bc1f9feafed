"""Alternating least squares: one half-step that fits users to given items, and so folds new users in.

    minimise over x:  sum over met items (r - x.y)^2  +  background * sum over all items (x.y)^2  +  penalty |x|^2

With `background` above 0 and r = 1 this is the implicit model of Hu, Koren & Volinsky (ICDM 2008), its penalty scaled
as Rendle et al. found it must be ("Revisiting the performance of iALS", RecSys 2022); with 0 it fits labels alone (Zhou
et al., AAIM 2008). The solution is exact, so a user folded in from a history has the vector that training would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

GATHERED = 4_000_000  # numbers of a batch's padded vectors or squares, 16 MB each


@dataclass(frozen=True)
class Penalty:
    """What keeps vectors short: `strength * (entries + background * columns) ** power` for each row."""

    background: float
    strength: float
    power: float = 1.0

    def of(self, entries: np.ndarray, columns: int) -> np.ndarray:
        """Penalty float32 [rows] of rows with so many entries in a matrix of so many columns."""
        return (self.strength * (entries + self.background * columns) ** self.power).astype(np.float32)


class Side:
    """The vectors that a half-step is given, [n, d], with what all its rows share. A vector of zeros is no vector.

    gram: their sum of squares [d, d]; num_known: how many there are. Both of all vectors, where only some are given.
    """

    def __init__(self, vectors: np.ndarray, gram: np.ndarray | None = None, num_known: int | None = None) -> None:
        self.count, self.rank = vectors.shape
        # Padding points at the row of zeros behind the others.
        self.padded = np.vstack([vectors, np.zeros((1, self.rank))]).astype(np.float32)
        self.vectors = self.padded[:-1]
        self.gram = self.vectors.T @ self.vectors if gram is None else gram
        self.known = self.vectors.any(axis=1)
        self.num_known = int(self.known.sum()) if num_known is None else num_known


def half_step(matrix: sp.csr_matrix, side: Side, penalty: Penalty) -> np.ndarray:
    """Vectors float32 [rows, d] of the rows of `matrix`, whose columns are `side`. A row without entries gets zeros.

    The matrix holds r at the pairs met, zeros stored where r is 0.
    """
    counts = np.diff(matrix.indptr)
    result = np.zeros((matrix.shape[0], side.rank), np.float32)
    everywhere = np.float32(penalty.background) * side.gram
    strengths, diagonal = penalty.of(counts, side.num_known), np.arange(side.rank)
    order = np.argsort(counts, kind="stable")  # rows of like length share a batch, so that little of it is padding
    for rows in _batches(order[counts[order] > 0], counts, side.rank):
        place = np.arange(counts[rows[-1]])[None, :]
        filled = place < counts[rows][:, None]
        entries = np.where(filled, matrix.indptr[rows][:, None] + place, 0)
        vectors = side.padded[np.where(filled, matrix.indices[entries], side.count)]
        values = np.where(filled, matrix.data[entries], 0).astype(np.float32)
        across = vectors.transpose(0, 2, 1)
        square = across @ vectors + everywhere
        square[:, diagonal, diagonal] += strengths[rows][:, None]
        result[rows] = np.linalg.solve(square, across @ values[:, :, None])[:, :, 0]
    return result


def factorise(matrix: sp.csr_matrix, rank: int, rounds: int, penalty: Penalty, seed: int) -> np.ndarray:
    """Vectors of the columns, float32 [columns, rank], after `rounds` of both half-steps from a random start.

    The rows' vectors are not kept: `half_step` gives them again. Columns without entries get zeros.
    """
    columns = matrix.T.tocsr()
    vectors = np.random.default_rng(seed).normal(0, rank**-0.5, (matrix.shape[1], rank)).astype(np.float32)
    vectors[np.diff(columns.indptr) == 0] = 0
    for _ in range(rounds):
        rows = half_step(matrix, Side(vectors), penalty)
        vectors = half_step(columns, Side(rows), penalty)
    return vectors


def _batches(order: np.ndarray, counts: np.ndarray, rank: int) -> Iterator[np.ndarray]:
    """Runs of `order` (rising counts), with padded vectors and squares of at most GATHERED numbers or one row."""
    stop = len(order)
    while stop:
        # The longest row, the last, sets the width.
        size = max(1, GATHERED // (rank * max(rank, int(counts[order[stop - 1]]))))
        yield order[max(0, stop - size) : stop]
        stop = max(0, stop - size)
