"""Alternating least squares (ALS): a half-step that fits user vectors to fixed item vectors (fold-in of new users).

    minimise over x:  sum over met items (r - x.y)^2  +  background * sum over all items (x.y)^2  +  penalty |x|^2
    solution:         (sum over met items y y^T + background * Y^T Y + penalty I) x = sum over met items r y

With `background` above 0 and r = 1 this is the implicit model of Hu, Koren & Volinsky (ICDM 2008), with the penalty
scaled as in Rendle et al., "Revisiting the performance of iALS" (RecSys 2022). With `background` 0 it fits labels alone
(Zhou et al., AAIM 2008). The solution is exact: a user folded in from a history has the vector of training.

Shapes: m rows, n columns, d the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

BATCH_SIZE = 4_000_000  # numbers of a batch's padded vectors or squares, 16 MB each


@dataclass(frozen=True)
class Regularisation:
    """Weights of the loss: `penalty = strength * (entries + background * columns) ** power` for each row.

    background: weight of the pairs that were not met.
    """

    background: float
    strength: float
    power: float = 1.0

    def penalties(self, entries: np.ndarray, columns: int) -> NDArray[np.float32]:
        """Penalties float32 [m] of rows with `entries` [m] entries each in a matrix of `columns` columns."""
        return (self.strength * (entries + self.background * columns) ** self.power).astype(np.float32)


class FixedSide:
    """The vectors [n, d] that a half-step holds fixed, with what all rows share. A vector of zeros counts as none.

    Args:
        vectors: [n, d].
        gram: Y^T Y [d, d] of all vectors, where `vectors` are only some of them.
        num_known: how many vectors are not zero, counted over all of them.
    """

    def __init__(self, vectors: np.ndarray, gram: np.ndarray | None = None, num_known: int | None = None) -> None:
        self.count, self.rank = vectors.shape
        # Padding points at row n, which is zeros.
        self.padded = np.vstack([vectors, np.zeros((1, self.rank))]).astype(np.float32)
        self.vectors = self.padded[:-1]
        self.gram = self.vectors.T @ self.vectors if gram is None else gram
        self.known: NDArray[np.bool_] = np.any(self.vectors, axis=1)
        self.num_known = int(self.known.sum()) if num_known is None else num_known


def half_step(matrix: sp.csr_matrix, side: FixedSide, regularisation: Regularisation) -> NDArray[np.float32]:
    """Vectors float32 [m, d] of the rows of `matrix` [m, n], whose columns are `side`.

    The matrix holds r at the pairs met, and a stored zero where r is 0. A row without entries gets zeros.
    """
    counts = np.diff(matrix.indptr)
    result = np.zeros((matrix.shape[0], side.rank), np.float32)
    everywhere = np.float32(regularisation.background) * side.gram  # [d, d]
    penalties, diagonal = regularisation.penalties(counts, side.num_known), np.arange(side.rank)
    order = np.argsort(counts, kind="stable")  # rows of similar length share a batch, so that little of it is padding
    for rows in _batches(order[counts[order] > 0], counts, side.rank):
        position = np.arange(counts[rows[-1]])[None, :]
        filled = position < counts[rows][:, None]  # [b, longest]
        entries = np.where(filled, matrix.indptr[rows][:, None] + position, 0)
        vectors = side.padded[np.where(filled, matrix.indices[entries], side.count)]  # [b, longest, d]
        values = np.where(filled, matrix.data[entries], 0).astype(np.float32)
        across = vectors.transpose(0, 2, 1)
        square = across @ vectors + everywhere  # [b, d, d]
        square[:, diagonal, diagonal] += penalties[rows][:, None]
        result[rows] = np.linalg.solve(square, across @ values[:, :, None])[:, :, 0]
    return result


def als_item_vectors(
    matrix: sp.csr_matrix, rank: int, rounds: int, regularisation: Regularisation, seed: int
) -> NDArray[np.float32]:
    """Vectors of the columns, float32 [n, rank], after `rounds` of both half-steps from a random start.

    The rows' vectors are not returned: `half_step` computes them again. Columns without entries get zeros.
    """
    columns = matrix.T.tocsr()
    vectors = np.random.default_rng(seed).normal(0, rank**-0.5, (matrix.shape[1], rank)).astype(np.float32)
    vectors[np.diff(columns.indptr) == 0] = 0
    for _ in range(rounds):
        rows = half_step(matrix, FixedSide(vectors), regularisation)
        vectors = half_step(columns, FixedSide(rows), regularisation)
    return vectors


def _batches(order: np.ndarray, counts: np.ndarray, rank: int) -> Iterator[np.ndarray]:
    """Yield runs of `order` (rising counts) whose padded arrays have at most BATCH_SIZE numbers, one row at least."""
    stop = len(order)
    while stop:
        # The longest row of a run is its last, and sets the padded length.
        size = max(1, BATCH_SIZE // (rank * max(rank, int(counts[order[stop - 1]]))))
        yield order[max(0, stop - size) : stop]
        stop = max(0, stop - size)
