"""Encodes a request as tokens, exactly as training does.

`Scorer`, `DomainBank` and `OnnxScorer` share this encoder. It needs NumPy alone: the item table and the tokenizer come
in behind the protocols `ItemSource` and `EventVocabulary`.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llmrec_peft.data.layout import window_start
from llmrec_peft.data.templates import fill
from llmrec_peft.data.values import value_key
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, quoted
from llmrec_peft.requests.encoded_request import EncodedRequest, Prefix, count_dropped
from llmrec_peft.requests.event_cache import EventCache
from llmrec_peft.requests.item_source import ItemSource
from llmrec_peft.requests.request import Event, History, Request
from llmrec_peft.requests.request_domain import RequestDomain
from llmrec_peft.requests.request_rules import PlainEvent, RequestRules

CACHED_EVENTS = 20_000
"""Events whose tokens are cached by default, about 10 MB."""


class EventVocabulary(Protocol):
    """A domain's fixed tokens and its tokenizer: `data.vocabulary.Vocabulary`, or that of an export.

    Attributes:
        prefix, suffix: int32 tokens that the tokenizer puts around one text (BOS, or CLS and SEP).
        marker: int32 tokens of the marker.
        outcomes: int32 tokens of each label's word, in class order.
        forbidden: texts that data may not spell.
    """

    prefix: np.ndarray
    suffix: np.ndarray
    marker: np.ndarray
    outcomes: list[np.ndarray]
    forbidden: list[str]

    def tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of texts, flat int32, and their offsets int64 [texts + 1]."""


class RequestEncoder:
    """Encodes the requests of one domain, with the items of one source.

    Threads may share an encoder: a lock guards its cache of encoded events.

    Attributes:
        domain: templates, labels and window.
        rules: validation of requests.
        cache: tokens of recent events and headers.
    """

    def __init__(
        self,
        domain: RequestDomain,
        vocabulary: EventVocabulary,
        items: ItemSource,
        cache_events: int = CACHED_EVENTS,
    ) -> None:
        self.domain, self.rules, self.cache = domain, RequestRules(domain), EventCache(cache_events)
        self.vocabulary, self.items = vocabulary, items
        self._event_columns = domain.event_columns
        self._outcomes = dict(zip(domain.labels, vocabulary.outcomes, strict=True))
        self._lock = threading.Lock()

    def encode(self, request: Request) -> EncodedRequest:
        """A whole request as tokens; errors begin with the request's name.

        Raises as `encode_history` and `encode_candidates` do, and DataError if the candidates are not a list.
        """
        request.count()
        with request.named():
            return self.encode_candidates(self.encode_history(request.history, request.user), request.candidates)

    def encode_history(self, history: History, user: Mapping[str, Any] | None = None) -> Prefix:
        """Tokens of the header and of the newest events that the window has room for.

        Args:
            history: (event, label) in time order, any number of them.
            user: columns that the domain's header names.

        Raises:
            DataError: an unknown item or label, a missing column, or a value that `RequestRules` refuses.
            DomainError: a value that no template can show, or that does not fit its format.
        """
        pairs, columns = self.rules.pairs(history), self.rules.user(user)
        # Also before the window: whether an id is known must not depend on how many events came after it.
        ids = [event for event, _ in pairs if isinstance(event, str)]
        if self.items.takes_any_id:
            self.encode_events(ids, "history")
        else:
            self.items.check(ids, "history")
        used = [pair for pair in pairs if pair[1] in self.domain.history_labels]
        used = used[window_start(len(used), self.domain.window, self.domain.stride) :]
        texts = self._encode([event for event, _ in used], "history")
        events = tuple(
            np.concatenate([tokens, self._outcomes[label]]) for tokens, (_, label) in zip(texts, used, strict=True)
        )
        return Prefix(np.concatenate([self.vocabulary.prefix, self._header(columns)]), events)

    def encode_candidates(self, prefix: Prefix, candidates: Sequence[Event], first: int = 0) -> EncodedRequest:
        """Candidates after a prefix; messages count them from `first`.

        Raises:
            DataError: an unknown item, or a missing column.
            DomainError: a value that no template can show, or that does not fit its format.
            StreamError: a candidate that does not fit `stream.max_length`.
        """
        tokens = self.encode_events(candidates, "candidates", first)
        suffix, limit = len(self.vocabulary.suffix), self.domain.max_length
        return EncodedRequest(prefix, tokens, count_dropped(prefix, tokens, suffix, limit, self.domain.name, first))

    def encode_events(self, events: Sequence[Event], what: str, first: int = 0) -> list[np.ndarray]:
        """Tokens of events with their markers; `what` names them in messages, counted from `first`.

        Raises:
            DataError: an unknown item, a column of the template that neither the event nor the item table has, or a
                value that `RequestRules` refuses.
            DomainError: a value that no template can show, or that does not fit its format.
        """
        return self._encode(self.rules.events(events, what, first), what)

    def _header(self, user: dict[str, Any]) -> np.ndarray:
        key = ("header", *(value_key(value) for value in user.values()))
        with self._lock:
            if key in self.cache:
                tokens = self.cache[key]
            else:
                header = self.domain.header
                text = fill(header, user, self.vocabulary.forbidden) if user else header
                tokens = self.vocabulary.tokens([text])[0]
            self.cache.put(key, tokens)
        return tokens

    def _encode(self, events: list[PlainEvent], what: str) -> list[np.ndarray]:
        """Tokens of plain events with their markers; only those that are not cached are tokenised."""
        keys = [_event_key(event) for event in events]
        with self._lock:
            found = self._tokenise(dict(zip(keys, events, strict=True)), what)
            tokens = [found[key] if key in found else self.cache[key] for key in keys]
            for key, value in zip(keys, tokens, strict=True):
                self.cache.put(key, value)
        return tokens

    def _tokenise(self, events: dict[Hashable, PlainEvent], what: str) -> dict[Hashable, np.ndarray]:
        """Tokens of the events that are not cached; all that give the same columns go through together."""
        groups: dict[tuple[str, ...] | None, list[Hashable]] = {}
        for key, event in events.items():
            if key not in self.cache:
                groups.setdefault(None if isinstance(event, str) else tuple(event), []).append(key)
        found: dict[Hashable, np.ndarray] = {}
        for given, keys in groups.items():
            flat, offsets = self.vocabulary.tokens(self._texts([events[key] for key in keys], given, what))
            for number, key in enumerate(keys):
                tokens = flat[offsets[number] : offsets[number + 1]]
                found[key] = np.concatenate([tokens, self.vocabulary.marker])
        return found

    def _texts(self, events: list[Any], given: tuple[str, ...] | None, what: str) -> list[str]:
        """Texts of events that all give the columns `given`, or of ids (None); the item source has the rest."""
        names = [name for name in self._event_columns if name not in (given or ())]
        ids = self._ids(events, names, given, what) if names else []
        template, forbidden = self.domain.event, self.vocabulary.forbidden
        if given is None:
            return self.items.texts(ids, template, forbidden)
        columns = self.items.values(ids, names) if names else {}
        return [
            fill(template, event | {name: columns[name][row] for name in names}, forbidden)
            for row, event in enumerate(events)
        ]

    def _ids(self, events: list[Any], names: list[str], given: tuple[str, ...] | None, what: str) -> list[str]:
        """Ids of events whose columns `names` the item source must have."""
        if given is not None and "item_id" not in given:
            raise DataError(
                f"{what}: event {quoted(events[0])} lacks {listed(names)}, which the template of domain "
                f"{self.domain.name!r} names; give it, or an item_id of the item table"
            )
        ids = [event if given is None else event["item_id"] for event in events]
        self.items.check(ids, what)
        missing = [name for name in names if name not in self.items.column_names]
        if missing:
            raise DataError(
                f"{what}: item {quoted(ids[0])} has no column {listed(missing)}, which the template of domain "
                f"{self.domain.name!r} names; give the event as {{'item_id': ..., {missing[0]!r}: ...}}"
            )
        return ids


def _event_key(event: PlainEvent) -> Hashable:
    """A key that is equal for events of the same text."""
    if isinstance(event, str):
        return event
    return ("columns", *sorted((name, *value_key(value)) for name, value in event.items()))
