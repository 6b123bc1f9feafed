"""Retrieval: a few hundred candidates out of a catalogue for one history, from several sources merged.

Sources: `popularity`, `cooccurrence` and `factors` from the fitted models; `text`, the items nearest in meaning to what
the user took (cosine of embeddings), which reaches items that nobody has met; and `fresh`, items without training rows,
nearest in meaning first, which would be tried too seldom among the text source's many. Everything is exact: blocks of a
matrix-vector product and a partition, which up to about a million items needs no approximate index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.retrieval.collaborative import best, inside
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex

SOURCES = ("cooccurrence", "factors", "text", "popularity", "fresh")
"""Sources by name; of equal claims the earlier one goes first."""

QUOTAS = {"cooccurrence": 3.0, "factors": 3.0, "text": 0.5, "popularity": 3.0, "fresh": 0.3}
"""Default shares of the places; a source that is not there leaves its places to the others. `fresh` is below what new
items earn at first, since what is never named is never learnt of: about 3 places of 100."""

NEWEST = 20  # positive items that make a taste in text
BLOCK = 65_536  # rows of the embeddings at a time


@dataclass(frozen=True)
class Candidates:
    """Items int64 [n], best first, each once; `sources` [n] int64, the place in SOURCES of who put it there.

    len(SOURCES) stands for the fill: items that no source named, taken so that there are as many as asked for.
    """

    items: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.items)


class Retriever:
    """Candidates for a history out of a catalogue.

    Args:
        evidence: fitted models, in the codes of the catalogue (`Evidence.for_items`).
        embeddings: float [items, d] of the items' texts by any encoder, or None; float16 will do. A row of zeros is an
            item without one. A function that makes them is called when they are needed first.
        quotas: share of the places by source, see QUOTAS; those not named get 0.

    Raises:
        DataError: embeddings that do not match the catalogue or are not finite.
        ConfigError: an unknown source, a negative share, none above 0, or a share for embeddings that are not given.
    """

    def __init__(
        self,
        retrieval_index: RetrievalIndex,
        embeddings: np.ndarray | Callable[[], np.ndarray] | None = None,
        quotas: Mapping[str, float] | None = None,
    ) -> None:
        self.retrieval_index, self._embeddings = retrieval_index, embeddings
        self.quotas = _check_quotas(quotas, embeddings is not None, retrieval_index)
        if not callable(embeddings):
            _ = self._text  # what is wrong with them is said at once
        # The newest first, as tables grow at their end.
        self._fresh = np.flatnonzero(retrieval_index.item_rows == 0)[::-1]

    @cached_property
    def _text(self) -> TextNeighbours | None:
        given = self._embeddings
        found = given() if callable(given) else given
        return None if found is None else TextNeighbours(found, self.retrieval_index.num_items)

    def retrieve(self, history: Histories, k: int, exclude: Sequence[int] | np.ndarray = ()) -> Candidates:
        """At most k candidates for the one user of `history`, none of `exclude` (item codes).

        Fewer than k come only where the catalogue has no more items left. Same arguments, same candidates.
        """
        if k < 0:
            raise ConfigError(f"retrieve: k must be 0 or more, not {k}; ask for the candidates that you want")
        names = [name for name in SOURCES if self.quotas.get(name, 0) > 0]
        lists = [self.source(name, history, k, exclude) for name in names]
        items, sources = _interleave(lists, [self.quotas[name] for name in names])
        sources = np.array([SOURCES.index(name) for name in names], np.int64)[sources]
        items, sources = items[:k], sources[:k]
        if len(items) < k:
            rest = self._rest(np.concatenate([items, inside(exclude, self.retrieval_index.num_items)]))[
                : k - len(items)
            ]
            items = np.concatenate([items, rest])
            sources = np.concatenate([sources, np.full(len(rest), len(SOURCES))])
        return Candidates(items, sources)

    def source(self, name: str, history: Histories, k: int, exclude: Sequence[int] | np.ndarray = ()) -> np.ndarray:
        """What one source alone names: item codes int64 [at most k], best first."""
        if name == "text":
            return np.empty(0, np.int64) if self._text is None else self._text.top(history, k, exclude)
        if name == "fresh":
            return self._fresh_items(history, k, exclude)
        return self.retrieval_index.models[name].top(history, k, exclude)

    def _fresh_items(self, history: Histories, k: int, exclude) -> np.ndarray:
        """Items without training rows: nearest in text first if there is a taste, else the table's newest first."""
        left = self._fresh[~np.isin(self._fresh, inside(exclude, self.retrieval_index.num_items))]
        if self._text is None or not len(left):
            return left[:k]
        scores = self._text.scores(history)
        if scores is None:
            return left[:k]
        return left[np.lexsort((np.arange(len(left)), -scores[left]))][:k]

    def _rest(self, taken: np.ndarray) -> np.ndarray:
        """All other items: those most met in training first, then the newest of the table."""
        left = np.ones(self.retrieval_index.num_items, bool)
        left[taken] = False
        left = np.flatnonzero(left)[::-1]
        return left[np.argsort(-self.retrieval_index.item_rows[left], kind="stable")]


class TextNeighbours:
    """Cosine of items' embeddings, less their mean, to the mean of the newest NEWEST positive history items' ones."""

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
        self._embeddings, self._has = embeddings, norms > 0
        # A language model's vectors share a large common part, which would make all items alike.
        self._mean = (total / max(1, self._has.sum())).astype(np.float32)
        for block in _row_blocks(num_items):
            norms[block] = np.linalg.norm(embeddings[block].astype(np.float32) - self._mean, axis=1)
        self._norms = np.where(norms > 0, norms, 1)

    def scores(self, history: Histories) -> np.ndarray | None:
        """Cosines float32 [items], -inf for items without an embedding; None if the history names none with one."""
        liked = inside(history.items[history.positive], len(self._embeddings))
        liked = liked[self._has[liked]][::-1]
        _, last = np.unique(liked, return_index=True)
        liked = liked[np.sort(last)[:NEWEST]]
        if not len(liked):
            return None
        taste = ((self._embeddings[liked].astype(np.float32) - self._mean) / self._norms[liked][:, None]).mean(axis=0)
        length = np.linalg.norm(taste)
        if not length > 0:
            return None
        scores = np.empty(len(self._embeddings), np.float32)
        for block in _row_blocks(len(scores)):
            scores[block] = (self._embeddings[block].astype(np.float32) - self._mean) @ (taste / length)
        return np.where(self._has, scores / self._norms, -np.inf)

    def top(self, history: Histories, k: int, exclude: Sequence[int] | np.ndarray = ()) -> np.ndarray:
        """Item codes int64 [at most k], nearest first, ties by the lower code; none without a positive history."""
        scores = self.scores(history)
        if scores is None:
            return np.empty(0, np.int64)
        scores[inside(exclude, len(scores))] = -np.inf
        return best(scores, k)


def recall(retrieved: Sequence[int] | np.ndarray, relevant: Sequence[int] | np.ndarray, k: int) -> float:
    """Share of the relevant items (each counted once) among the first k retrieved; NaN if nothing is relevant."""
    wanted = np.unique(np.asarray(relevant, np.int64))
    if not len(wanted):
        return float("nan")
    return float(np.isin(wanted, np.asarray(retrieved, np.int64)[:k]).mean())


def _interleave(lists: Sequence[np.ndarray], shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Merge ranked lists: place r of a list with share q claims (r + 1) / q, and low claims go first.

    So among the first places each list has its share, and an item of several lists comes once, by its best claim.
    Returns the items and the number of the list of each.
    """
    if not lists:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    items = np.concatenate(lists)
    numbers = np.repeat(np.arange(len(lists)), [len(part) for part in lists])
    claims = np.concatenate([(np.arange(len(p)) + 1) / q for p, q in zip(lists, shares, strict=True)])
    order = np.lexsort((numbers, claims))
    _, first = np.unique(items[order], return_index=True)
    kept = order[np.sort(first)]
    return items[kept].astype(np.int64), numbers[kept]


def _check_quotas(quotas: Mapping[str, float] | None, text: bool, retrieval_index: RetrievalIndex) -> dict[str, float]:
    have = {name for name in SOURCES if name in retrieval_index.models or name == "fresh" or (name == "text" and text)}
    if quotas is None:
        return {name: share for name, share in QUOTAS.items() if name in have}
    for name, share in quotas.items():
        if name not in SOURCES:
            raise ConfigError(f"quotas: there is no source {name!r}; use {', '.join(SOURCES)}")
        if not share >= 0 or share == float("inf"):
            raise ConfigError(f"quotas: the share of {name} must be 0 or more, not {share}; correct it")
        if share and name not in have:
            raise ConfigError(f"quotas: source {name} has a share, but is not there; give its model or embeddings")
    if not sum(quotas.values()) > 0:
        raise ConfigError("quotas: no source has a share above 0; give one, such as popularity: 1")
    return dict(quotas)


def _row_blocks(size: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
