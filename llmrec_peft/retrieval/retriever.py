"""Retrieval: a few hundred candidates of a catalogue for one history, merged from several sources.

Sources: `popularity`, `cooccurrence` and `factors` are fitted models. `text` gives the items nearest in meaning to the
user's positive items (cosine of embeddings), among them items without training rows. `fresh` gives such new items
alone, nearest in meaning first, since few of them would be among the candidates otherwise. The search is exact: blocks
of a matrix-vector product and a partition need no approximate index up to about a million items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from llmrec_peft.errors import ConfigError
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.item_codes import Codes, known_codes
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.retrieval.text_neighbours import TextNeighbours

SOURCES = ("cooccurrence", "factors", "text", "popularity", "fresh")
"""Sources by name; an earlier source wins ties in the merged order."""

QUOTAS = {"cooccurrence": 3.0, "factors": 3.0, "text": 0.5, "popularity": 3.0, "fresh": 0.3}
"""Default fraction of the candidates from each source; the others share the part of a missing source.

`fresh` gets about 3 of 100 candidates, so that new items are shown at all and gather rows to be learnt from.
"""


@dataclass(frozen=True)
class Candidates:
    """Retrieved items, best first, each once.

    Attributes:
        items: int64 [n], item codes.
        sources: int64 [n], index in SOURCES of the source that put it there. len(SOURCES) is the fill: items of no
            source, added to reach k.
    """

    items: Codes
    sources: Codes

    def __len__(self) -> int:
        return len(self.items)


class Retriever:
    """Retrieves candidates for a history from a catalogue.

    Args:
        retrieval_index: fitted models, in the codes of the catalogue (`RetrievalIndex.for_items`).
        embeddings: float [items, d] of the items' texts by any encoder, or None; float16 will do. A row of zeros is an
            item without one. A function that returns them is called when they are first needed.
        quotas: fraction of the candidates by source, see QUOTAS; sources that are not named get 0.

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
            _ = self._text  # wrong embeddings are refused here and not at the first request
        # Newest first: tables grow at their end.
        self._fresh = np.flatnonzero(retrieval_index.item_rows == 0)[::-1]

    @cached_property
    def _text(self) -> TextNeighbours | None:
        given = self._embeddings
        found = given() if callable(given) else given
        return None if found is None else TextNeighbours(found, self.retrieval_index.num_items)

    def retrieve(self, history: Histories, k: int, exclude: ArrayLike = ()) -> Candidates:
        """At most k candidates for the one user of `history`, none of `exclude` (item codes).

        Fewer than k are returned only where the catalogue has no more items. The result is deterministic.
        """
        if k < 0:
            raise ConfigError(f"retrieve: k must be 0 or more, not {k}; ask for the candidates that you want")
        names = [name for name in SOURCES if self.quotas.get(name, 0) > 0]
        ranked = [self.source(name, history, k, exclude) for name in names]
        items, sources = _interleave(ranked, [self.quotas[name] for name in names])
        sources = np.array([SOURCES.index(name) for name in names], np.int64)[sources]
        items, sources = items[:k], sources[:k]
        if len(items) < k:
            excluded = known_codes(exclude, self.retrieval_index.num_items)
            rest = self._rest(np.concatenate([items, excluded]))[: k - len(items)]
            items = np.concatenate([items, rest])
            sources = np.concatenate([sources, np.full(len(rest), len(SOURCES))])
        return Candidates(items, sources)

    def source(self, name: str, history: Histories, k: int, exclude: ArrayLike = ()) -> Codes:
        """Candidates of one source alone: item codes int64 [at most k], best first."""
        if name == "text":
            return np.empty(0, np.int64) if self._text is None else self._text.top(history, k, exclude)
        if name == "fresh":
            return self._fresh_items(history, k, exclude)
        return self.retrieval_index.models[name].top(history, k, exclude)

    def _fresh_items(self, history: Histories, k: int, exclude: ArrayLike) -> Codes:
        """Items without training rows: nearest in text first if the history has positives, else the table's newest."""
        left = self._fresh[~np.isin(self._fresh, known_codes(exclude, self.retrieval_index.num_items))]
        if self._text is None or not len(left):
            return left[:k]
        scores = self._text.scores(history)
        if scores is None:
            return left[:k]
        return left[np.lexsort((np.arange(len(left)), -scores[left]))][:k]

    def _rest(self, taken: Codes) -> Codes:
        """All other items: those with most training rows first, then the newest of the table."""
        # Reversed, so that the stable sort puts newer items first among equal counts.
        free = np.ones(self.retrieval_index.num_items, bool)
        free[taken] = False
        left = np.flatnonzero(free)[::-1]
        return left[np.argsort(-self.retrieval_index.item_rows[left], kind="stable")]


def recall(retrieved: ArrayLike, relevant: ArrayLike, k: int) -> float:
    """recall@k = |first k retrieved and relevant| / |relevant|, each item counted once; NaN if nothing is relevant."""
    wanted = np.unique(np.asarray(relevant, np.int64))
    if not len(wanted):
        return float("nan")
    return float(np.isin(wanted, np.asarray(retrieved, np.int64)[:k]).mean())


def _interleave(rankings: Sequence[Codes], shares: Sequence[float]) -> tuple[Codes, Codes]:
    """Merge rankings by weighted rank: the item at rank r (from 1) of a ranking with share q gets the key r / q.

    Low keys go first, so each ranking has its share among the first items. An item of several rankings is taken once,
    by its lowest key. Returns the items and the number of the ranking of each.
    """
    if not rankings:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    items = np.concatenate(rankings)
    numbers = np.repeat(np.arange(len(rankings)), [len(ranking) for ranking in rankings])
    keys = np.concatenate([(np.arange(len(r)) + 1) / q for r, q in zip(rankings, shares, strict=True)])
    order = np.lexsort((numbers, keys))  # ties go to the earlier source
    _, first = np.unique(items[order], return_index=True)  # lowest key of each item
    merged = order[np.sort(first)]
    return items[merged].astype(np.int64), numbers[merged]


def _check_quotas(quotas: Mapping[str, float] | None, text: bool, retrieval_index: RetrievalIndex) -> dict[str, float]:
    available = {
        name for name in SOURCES if name in retrieval_index.models or name == "fresh" or (name == "text" and text)
    }
    if quotas is None:
        return {name: share for name, share in QUOTAS.items() if name in available}
    for name, share in quotas.items():
        if name not in SOURCES:
            raise ConfigError(f"quotas: there is no source {name!r}; use {', '.join(SOURCES)}")
        if not share >= 0 or share == float("inf"):
            raise ConfigError(f"quotas: the share of {name} must be 0 or more, not {share}; correct it")
        if share and name not in available:
            raise ConfigError(f"quotas: source {name} has a share, but is not available; give its model or embeddings")
    if not sum(quotas.values()) > 0:
        raise ConfigError("quotas: no source has a share above 0; give one, such as popularity: 1")
    return dict(quotas)
