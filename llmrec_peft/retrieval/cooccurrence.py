"""Item co-occurrence: item-based nearest neighbours over the positive events."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import ConfigError
from llmrec_peft.retrieval.collaborative_model import Arrays, CollaborativeModel, pairs_by_user
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.item_codes import Codes, is_known, rows_at


@dataclass
class ItemCooccurrence(CollaborativeModel):
    """Item-based nearest neighbours (Sarwar et al., "Item-based collaborative filtering", WWW 2001) over positives.

        similarity(i, j) = users of both / (sqrt(users of i * users of j) + shrink)
        score(u, j)      = sum of similarity(i, j) over the `newest` last different positive items i of u

    Each item has at most `neighbours` non-zero similarities. Of a user with more than `longest` positive items, `fit`
    reads the newest, so it takes at most rows x longest products.
    """

    NAME: ClassVar[str] = "cooccurrence"
    # starts, near, similarity: a CSR matrix [num_items, num_items].
    ARRAYS: ClassVar[dict[str, str]] = {"counts": "items", "starts": "total", "near": "total", "similarity": "total"}

    neighbours: int = 50
    shrink: float = 10.0
    newest: int = 50
    longest: int = 1000

    def _check(self) -> None:
        if min(self.neighbours, self.newest, self.longest) < 1 or not self.shrink >= 0:
            raise ConfigError(f"cooccurrence: settings must be 1 or more and shrink 0 or more, got {self.settings()}")

    def _fit(self, log: BehaviorLog, rows: Codes, positive: NDArray[np.bool_]) -> Arrays:
        histories = Histories.from_rows(log, rows[positive])
        matrix = histories.newest(self.longest).matrix(log.num_items)  # [users, items]
        counts = np.bincount(matrix.indices, minlength=log.num_items)  # [items], users of each
        across = matrix.T.tocsr()  # [items, users]
        blocks = []
        # A row of `across` times `matrix` takes as many products as its users have items in sum.
        for start, stop in _blocks(across @ np.diff(matrix.indptr), self.BLOCK_SIZE):
            both = (across[start:stop] @ matrix).tocoo()  # users of both items
            row, column = both.row + start, both.col
            value = both.data / (np.sqrt(counts[row] * counts[column]) + self.shrink)
            other = row != column
            blocks.append(_nearest(row[other], column[other], value[other], self.neighbours))
        row, near, similarity = (np.concatenate(part) for part in zip(*blocks, strict=True))
        # CSR: the neighbours of item i are at starts[i]:starts[i + 1].
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=log.num_items))])
        return {
            "counts": counts.astype(np.int64),
            "starts": starts.astype(np.int64),
            "near": near.astype(np.int32),
            "similarity": similarity.astype(np.float32),
        }

    @cached_property
    def similarities(self) -> sp.csr_matrix:
        """float32 [num_items, num_items]: similarities of each item to its neighbours."""
        arrays, size = self.arrays, self.num_items
        return sp.csr_matrix((arrays["similarity"], arrays["near"], arrays["starts"]), shape=(size, size))

    def recode(self, old_codes: Codes) -> Self:
        known = np.flatnonzero(old_codes >= 0)
        # select [new items, old items] has a 1 where a new item is an old one: new = select @ old @ select.T
        select = sp.csr_matrix(
            (np.ones(len(known), np.float32), (known, old_codes[known])), (len(old_codes), self.num_items)
        )
        moved = (select @ self.similarities @ select.T).tocsr()
        moved.sort_indices()
        other = dataclasses.replace(self)
        other.set_arrays({
            "counts": rows_at(self.arrays["counts"], old_codes), "starts": moved.indptr.astype(np.int64),
            "near": moved.indices.astype(np.int32), "similarity": moved.data.astype(np.float32),
        })  # fmt: skip
        return other

    def has_valid_arrays(self, num_items: int) -> bool:
        starts, near = self.arrays["starts"], self.arrays["near"]
        return (
            super().has_valid_arrays(num_items)
            and len(starts) == num_items + 1
            and bool(starts[0] == 0)
            and bool((np.diff(starts) >= 0).all())
            and bool(starts[-1] == len(near) == len(self.arrays["similarity"]))
            and bool(((near >= 0) & (near < num_items)).all())
        )

    def _sums(self, histories: Histories) -> sp.csr_matrix:
        """Scores [u, num_items], sparse."""
        return histories.positives().newest(self.newest).matrix(self.num_items) @ self.similarities

    def score_all(self, histories: Histories) -> np.ndarray:
        scores = self._sums(histories).toarray()
        scores[scores <= 0] = -np.inf  # no shared user: nothing to retrieve
        return scores

    def score_pairs(self, histories: Histories, owners: Codes, candidates: Codes) -> np.ndarray:
        known, result = is_known(candidates, self.num_items), np.zeros(len(candidates))
        for users, pairs in pairs_by_user(histories, owners, self.BLOCK_SIZE // max(1, self.neighbours)):
            pairs = pairs[known[pairs]]
            if len(pairs):
                sums = self._sums(histories.part(users.start, users.stop))
                result[pairs] = np.asarray(sums[owners[pairs] - users.start, candidates[pairs]]).ravel()
        return result


def _blocks(products: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of items with at most `limit` products [items] in sum, one item at least."""
    sums = np.concatenate([[0], np.cumsum(products)])
    start = 0
    while start < len(products):
        stop = max(start + 1, int(np.searchsorted(sums, sums[start] + limit, "right")) - 1)
        yield start, stop
        start = stop


def _nearest(row: np.ndarray, column: np.ndarray, value: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """The `count` highest values of each row, ties by the lower column; sorted by row, then column."""
    order = np.lexsort((column, -value, row))
    row, column, value = row[order], column[order], value[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)  # within the row, from 0
    nearest = np.flatnonzero(rank < count)
    nearest = nearest[np.lexsort((column[nearest], row[nearest]))]
    return row[nearest], column[nearest], value[nearest]
