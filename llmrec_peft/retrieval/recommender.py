"""Recommendations for a history: retrieval selects candidates, a scorer and a fusion rank them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np

from llmrec_peft.data.domain import Domain
from llmrec_peft.errors import ConfigError, DataError, LLMRecError, input_errors
from llmrec_peft.messages import quoted
from llmrec_peft.requests.argument_checks import as_list, check_list, is_count
from llmrec_peft.requests.batching import BATCH_TOKENS
from llmrec_peft.requests.item_table import ItemTable
from llmrec_peft.requests.request import Event, History
from llmrec_peft.requests.request_encoder import RequestEncoder
from llmrec_peft.requests.request_rules import item_id
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.retrieval.retriever import SOURCES, Retriever

POOL = 100
"""Number of candidates that retrieval returns for the LLM to rank, by default."""
FUSED_TOGETHER = 4096
"""Candidates whose features are in memory together."""

Id = str | int | np.integer
"""An item id, as a caller may give it."""


class CandidateScorer(Protocol):
    """The methods of a scorer that a `Recommender` calls; `scoring.scorer.Scorer` has them."""

    @property
    def domain(self) -> Domain: ...

    @property
    def labels(self) -> list[str]: ...

    @property
    def items(self) -> ItemTable: ...

    @property
    def encoder(self) -> RequestEncoder: ...

    def score(
        self,
        history: History,
        candidates: Sequence[Event],
        user: Mapping[str, Any] | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> np.ndarray:
        """Probabilities float64 [candidates, labels]."""

    def score_many(self, requests: Iterable[Sequence[Any]], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """What `score` returns, for each (history, candidates, user)."""

    def embed_items(self) -> np.ndarray:
        """Embeddings of the items' texts, float [items, d]."""


@dataclass(frozen=True)
class Recommendation:
    """One item of a ranked list.

    Attributes:
        item_id: id in the item table.
        score: probability of any label but the negative one; the list is in its order.
        probabilities: probability of each label, in class order; fused if there is a fusion.
        source: where the candidate came from: a retrieval source, `fill`, `all` (the whole table) or `given`.
    """

    item_id: str
    score: float
    probabilities: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class _Choice:
    """Candidates of one history: item codes [n], each once, and the source of each."""

    history: Histories
    codes: np.ndarray
    sources: list[str]


class _Events(Sequence[Event]):
    """Events of items, made on access: ids, or mappings with the columns of the moment."""

    def __init__(self, ids: Sequence[str], codes: np.ndarray, context: Mapping[str, Any] | None) -> None:
        self._ids, self._codes, self._context = ids, codes, context

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, place: int) -> Event: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Event]: ...

    def __getitem__(self, place: int | slice) -> Event | Sequence[Event]:
        if isinstance(place, slice):
            return _Events(self._ids, self._codes[place], self._context)
        item = self._ids[self._codes[place]]
        return {**self._context, "item_id": item} if self._context else item


class Recommender:
    """Ranks the items of a table for one history after another.

    Args:
        scorer: with an item table.
        retrieval_index: collaborative models of the training log, in the codes of any item table; without it the LLM
            ranks the whole table.
        fusion: fitted with the scorer and the retrieval index, or None.
        embeddings: float [items of the table, d] for retrieval by text; by default those of `scorer.embed_items`,
            computed on first use: items x the base's width x 2 bytes. `quotas` without `text` and `fresh` need none.
        quotas: fraction of the candidates from each retrieval source; see `Retriever`.
    """

    def __init__(
        self,
        scorer: CandidateScorer,
        retrieval_index: RetrievalIndex | None = None,
        fusion: Fusion | None = None,
        *,
        embeddings: np.ndarray | None = None,
        quotas: Mapping[str, float] | None = None,
    ) -> None:
        if retrieval_index is None and (embeddings is not None or quotas):
            raise ConfigError(
                "quotas and embeddings are for retrieval, which needs a retrieval index; give one, or leave them out"
            )
        self.scorer, self.fusion = scorer, fusion
        self.items = scorer.items
        if not len(self.items):
            raise DataError("recommending needs an item table; give items= to Scorer.load")
        self.ids = self.items.ids()
        self.retrieval_index = None if retrieval_index is None else retrieval_index.for_items(self.ids)
        self.retriever: Retriever | None = None
        if self.retrieval_index is not None:
            # An event that is the item's id alone has no text.
            has_text = scorer.domain.event_columns != ["item_id"]
            own: Callable[[], np.ndarray] | None = scorer.embed_items if has_text else None
            self.retriever = Retriever(self.retrieval_index, own if embeddings is None else embeddings, quotas)

    def recommend(
        self,
        history: History,
        k: int = 10,
        *,
        user: Mapping[str, Any] | None = None,
        candidates: Sequence[Id] | None = None,
        context: Mapping[str, Any] | None = None,
        exclude: Sequence[Id] = (),
        pool: int = POOL,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[Recommendation]:
        """The k best items for a history, best first; fewer where no more are left.

        Args:
            history: (event, label) in time order; empty for a new user.
            user: columns that the domain's header names.
            candidates: item ids to rank, instead of retrieved ones; excluded ones are left out.
            context: columns of the moment that the event's template names, the same for all candidates.
            exclude: item ids to leave out, beside those that `recommend.exclude` of the domain leaves out.
            pool: number of candidates that retrieval returns.
            batch_tokens: tokens of one forward pass, at most.

        Raises:
            DataError: an unknown item or label, or a missing column.
            StreamError: a candidate that does not fit `stream.max_length`.
            ConfigError: k or pool below 1.
        """
        given = self._given(k, pool, candidates, exclude)
        choice = self._choice(history, given, self._pool(pool, k), {})
        found = self.scorer.score(history, self._events(choice.codes, context), user, batch_tokens=batch_tokens)
        return self._ranked(choice, found, k)

    def recommend_many(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        users: Sequence[Mapping[str, Any] | None] | None = None,
        contexts: Sequence[Mapping[str, Any] | None] | None = None,
        candidates: Sequence[Id] | None = None,
        exclude: Sequence[Id] = (),
        pool: int = POOL,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[list[Recommendation]]:
        """What `recommend` returns for each history. All are scored together: equal histories are encoded once.

        Args:
            histories: a list of histories of any lengths.
            users, contexts: one for each history, as `user` and `context` of `recommend`; None if no history has one.
            k, candidates, exclude, pool, batch_tokens: as in `recommend`, the same for all.

        Raises as `recommend` does; the message names the request. DataError for another number of users or contexts.
        """
        histories = as_list("histories", histories)
        users = [None] * len(histories) if users is None else as_list("users", users)
        contexts = [None] * len(histories) if contexts is None else as_list("contexts", contexts)
        for what, values in (("users", users), ("contexts", contexts)):
            if len(values) != len(histories):
                raise DataError(f"{what} has {len(values)} entries for {len(histories)} histories; give one for each")
        given = self._given(k, pool, candidates, exclude)
        known: dict[bytes, tuple[np.ndarray, list[str]]] = {}
        choices = []
        for number, history in enumerate(histories):
            try:
                choices.append(self._choice(history, given, self._pool(pool, k), known))
            except LLMRecError as error:
                raise type(error)(f"request {number}: {error}") from None
        requests = [
            (history, self._events(choice.codes, context), user)
            for history, choice, context, user in zip(histories, choices, contexts, users, strict=True)
        ]
        found = self.scorer.score_many(requests, batch_tokens=batch_tokens)
        return [self._ranked(choice, part, k) for choice, part in zip(choices, found, strict=True)]

    def _pool(self, pool: int, k: int) -> int:
        return min(max(pool, k), len(self.ids))

    def _events(self, codes: np.ndarray, context: Mapping[str, Any] | None) -> _Events:
        if context is not None and not isinstance(context, Mapping):
            raise DataError(f"context must be a mapping of columns, not {quoted(context)}; correct it")
        return _Events(self.ids, codes, context)

    def _ranked(self, choice: _Choice, found: np.ndarray, k: int) -> list[Recommendation]:
        """The k best of a choice by its probabilities [candidates, labels], fused where there is a fusion."""
        found = self._fused(choice, found)
        scores = 1 - found[:, self.scorer.domain.negative_class]
        order = np.argsort(-scores, kind="stable")[:k]
        return [
            Recommendation(self.ids[choice.codes[n]], float(scores[n]), tuple(map(float, found[n])), choice.sources[n])
            for n in order
        ]

    def _fused(self, choice: _Choice, found: np.ndarray) -> np.ndarray:
        """Probabilities [candidates, labels] after fusion, computed for FUSED_TOGETHER candidates at a time."""
        index, fusion = self.retrieval_index, self.fusion
        if fusion is None or index is None or not len(found):
            return found
        fused = []
        for start in range(0, len(found), FUSED_TOGETHER):
            part = slice(start, start + FUSED_TOGETHER)
            codes = choice.codes[part]
            features = index.features(choice.history, np.zeros(len(codes), np.int64), codes)
            fused.append(fusion.apply(np.log(np.maximum(found[part], 1e-300)), features))
        return np.concatenate(fused)

    # -- candidates ----------------------------------------------------------------------------

    def _given(
        self, k: int, pool: int, candidates: Sequence[Id] | None, exclude: Sequence[Id]
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Codes of the given candidates, each once, or None; and codes of the excluded items."""
        if not is_count(k) or not is_count(pool):
            raise ConfigError(
                f"recommend: k and pool must be at least 1, not {quoted(k)} and {quoted(pool)}; ask for one item "
                "at least"
            )
        return None if candidates is None else self._codes("candidates", candidates), self._codes("exclude", exclude)

    def _codes(self, what: str, ids: Sequence[Id]) -> np.ndarray:
        """Rows of items, int64, each once."""
        with input_errors(DataError, what, "give a list of item ids"):
            check_list(what, ids)
            wrong = [item for item in ids if isinstance(item, bool) or not isinstance(item, Id)]
            if wrong:
                raise DataError(f"{what} must be a list of item ids, and has {quoted(wrong[0])}; correct it")
            named = [item_id(item, what) for item in ids]
        rows = self.items.rows(named, what)
        return rows[np.sort(np.unique(rows, return_index=True)[1])]

    def _choice(
        self,
        history: History,
        given: tuple[np.ndarray | None, np.ndarray],
        pool: int,
        known: dict[bytes, tuple[np.ndarray, list[str]]],
    ) -> _Choice:
        """The candidates of a history; `known` caches those of equal histories."""
        domain = self.scorer.domain
        pairs = self.scorer.encoder.rules.pairs(history)
        codes = np.array([self._code(event) for event, _ in pairs], np.int64)
        labels = [label for _, label in pairs]
        past = Histories.of(codes, [label != domain.labels[domain.negative_class] for label in labels])
        excluded = excluded_labels(domain)
        done = np.array([label in excluded for label in labels], bool)
        key = b"".join(array.tobytes() for array in (codes, past.positive, done))
        if key not in known:
            out = np.concatenate([codes[done & (codes >= 0)], given[1]])
            known[key] = self._candidates(past, given[0], out, pool)
        return _Choice(past, *known[key])

    def _code(self, event: Event) -> int:
        """The row of an event's item; -1 if the table lacks it."""
        item = event.get("item_id") if isinstance(event, Mapping) else event
        row = None if item is None else self.items.row(str(item))
        return -1 if row is None else row

    def _candidates(
        self, past: Histories, given: np.ndarray | None, out: np.ndarray, pool: int
    ) -> tuple[np.ndarray, list[str]]:
        """Item codes [n], each once, and the source of each."""
        if given is not None:
            codes = given[~np.isin(given, out)]
            return codes, ["given"] * len(codes)
        if self.retriever is None:
            codes = np.setdiff1d(np.arange(len(self.ids)), out)
            return codes, ["all"] * len(codes)
        named = self.retriever.retrieve(past, pool, out)
        names = [*SOURCES, "fill"]
        return named.items, [names[number] for number in named.sources]


def excluded_labels(domain: Domain) -> set[str]:
    """Labels of a history whose items are not recommended again."""
    return set(domain.labels if domain.recommend.exclude is None else domain.recommend.exclude)
