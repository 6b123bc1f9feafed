"""Text neighbours: items whose text is nearest in meaning to what a user took, by the cosine of embeddings."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrec_peft.errors import DataError
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.item_codes import Codes, known_codes, top_k

NEWEST = 20  # positive items of a history that are averaged
BLOCK = 65_536  # rows of the embeddings at a time


class TextNeighbours:
    """Cosine of item embeddings to the mean of those of a history's newest positive items, all centred.

        score(u, j) = cos(e_j - m, mean over the NEWEST newest positive items i of (e_i - m) / |e_i - m|)

    m is the mean of all embeddings. The search is exact, in blocks of rows.

    Args:
        embeddings: float [num_items, d]; float16 will do. A row of zeros is an item without an embedding.
    """

    def __init__(self, embeddings: np.ndarray, num_items: int) -> None:
        embeddings = np.asarray(embeddings)
        if embeddings.ndim != 2 or len(embeddings) != num_items or embeddings.dtype.kind != "f":
            raise DataError(
                f"embeddings must be floats [{num_items} items, d], got {embeddings.dtype} {embeddings.shape}; encode "
                "every item of the table, in its order"
            )
        norms, total = np.empty(num_items, np.float32), np.zeros(embeddings.shape[1])
        for block in _row_blocks(num_items):
            part = embeddings[block].astype(np.float32)
            if not np.isfinite(part).all():
                raise DataError(
                    f"embeddings of items {block.start} to {block.stop - 1} hold values that are not finite"
                )
            norms[block] = np.linalg.norm(part, axis=1)
            total += part.sum(axis=0, dtype=np.float64)
        self._embeddings, self._has_embedding = embeddings, norms > 0
        # A language model's vectors share a large common part, which would make all items alike.
        self._mean = (total / max(1, self._has_embedding.sum())).astype(np.float32)
        for block in _row_blocks(num_items):
            norms[block] = np.linalg.norm(embeddings[block].astype(np.float32) - self._mean, axis=1)
        self._norms = np.where(norms > 0, norms, 1)

    def scores(self, history: Histories) -> NDArray[np.float32] | None:
        """Cosines float32 [items], -inf for items without an embedding; None if no positive item has one."""
        # Newest first; of an item that occurs twice the newer event counts.
        liked = known_codes(history.items[history.positive], len(self._embeddings))
        liked = liked[self._has_embedding[liked]][::-1]
        _, last = np.unique(liked, return_index=True)
        liked = liked[np.sort(last)[:NEWEST]]
        if not len(liked):
            return None
        direction = ((self._embeddings[liked].astype(np.float32) - self._mean) / self._norms[liked][:, None]).mean(
            axis=0
        )
        length = np.linalg.norm(direction)
        if not length > 0:  # opposite vectors may cancel
            return None
        scores = np.empty(len(self._embeddings), np.float32)
        for block in _row_blocks(len(scores)):
            # [block, d] @ [d]; a block of float16 is converted at a time.
            scores[block] = (self._embeddings[block].astype(np.float32) - self._mean) @ (direction / length)
        return np.where(self._has_embedding, scores / self._norms, -np.inf)

    def top(self, history: Histories, k: int, exclude: ArrayLike = ()) -> Codes:
        """Item codes int64 [at most k], nearest first, ties by the lower code; none without a positive item."""
        scores = self.scores(history)
        if scores is None:
            return np.empty(0, np.int64)
        scores[known_codes(exclude, len(scores))] = -np.inf
        return top_k(scores, k)


def _row_blocks(size: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
