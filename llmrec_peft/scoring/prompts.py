"""From a history and its candidates to token streams, as training laid them down."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec_peft.data.layout import window_start
from llmrec_peft.data.rendering import python_values
from llmrec_peft.data.templates import fill
from llmrec_peft.data.values import value_key
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, quoted
from llmrec_peft.scoring.item_table import Catalogue
from llmrec_peft.serving.plain_prompts import event_key, events_to_drop
from llmrec_peft.serving.request_rules import Event, RequestRules

KNOWN_EVENTS = 20_000
"""Texts whose tokens are kept, about 10 MB of them; beyond, those that were not asked for the longest go."""


@dataclass(frozen=True)
class Prefix:
    """What all candidates of one request see: tokens of the header, and of each history event with its outcome."""

    header: np.ndarray
    events: tuple[np.ndarray, ...]

    def tail(self, dropped: int) -> tuple[np.ndarray, ...]:
        """The header and the events without the oldest `dropped`."""
        return (self.header, *self.events[dropped:])


class Prompts:
    """One domain's words for the items of one table, and the tokens of what was asked for before.

    Threads may share one: what it keeps is read and written under a lock.
    """

    def __init__(self, vocabulary: Vocabulary, catalogue: Catalogue) -> None:
        domain = vocabulary.domain
        self.domain, self.catalogue, self.vocabulary = domain, catalogue, vocabulary
        self._lock = threading.Lock()
        self.window = domain.stream.context + domain.stream.targets - 1
        self.stride = max(1, domain.stream.targets // 3)
        joining = domain.stream.history_labels
        self._joins = set(domain.labels if joining is None else joining)
        self._classes = {label: number for number, label in enumerate(domain.labels)}
        self._rules = RequestRules(domain.name, domain.labels, domain.event_columns, domain.header_columns)
        self._tokens: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    # -- what a caller gives -------------------------------------------------------------------

    def prefix(self, history: Sequence[tuple[Event, str]], user: Mapping[str, Any] | None = None) -> Prefix:
        """Tokens of a header and of the newest events that a window has room for by number.

        Args:
            history: (event, label) in time order, any number of them.
            user: columns that the domain's header names.

        Raises:
            DataError: an unknown item or label, a column that is missing, or what `RequestRules` refuses.
            DomainError: a value that no template can show, or that does not fit its format.
        """
        pairs, columns = self.pairs(history), self._rules.user(user)
        # Also before the window: whether an id is known must not depend on how much came after it.
        self.catalogue.rows([event for event, _ in pairs if isinstance(event, str)], "history")
        seen = [pair for pair in pairs if pair[1] in self._joins]
        seen = seen[window_start(len(seen), self.window, self.stride) :]
        texts = self.events([event for event, _ in seen], "history")
        words = self.vocabulary.outcomes
        events = tuple(
            np.concatenate([tokens, words[self._classes[label]]])
            for tokens, (_, label) in zip(texts, seen, strict=True)
        )
        return Prefix(np.concatenate([self.vocabulary.prefix, self._header(columns)]), events)

    def pairs(self, history: Sequence[tuple[Event, str]]) -> list[tuple[str | dict[str, Any], str]]:
        """The entries of a history, plain; see `RequestRules.pairs`."""
        return self._rules.pairs(history)

    def _header(self, user: dict[str, Any]) -> np.ndarray:
        key = ("header", *(value_key(value) for value in user.values()))
        with self._lock:
            if key not in self._tokens:
                text = fill(self.domain.header, user, self.vocabulary.forbidden) if user else self.domain.header
                self._keep(key, self.vocabulary.tokens([text])[0])
            return self._tokens[key]

    def events(self, events: Sequence[Event], what: str, first: int = 0) -> list[np.ndarray]:
        """Tokens of events with their markers; `what` says in messages where they stood, counted from `first`.

        Raises:
            DataError: an unknown item, a column that the template names and neither the event nor the table has, or
                what `RequestRules` refuses.
            DomainError: a value that no template can show, or that does not fit its format.
        """
        plain_events = self._rules.events(events, what, first)
        keys = [event_key(event) for event in plain_events]
        with self._lock:
            return self._known(dict(zip(keys, plain_events, strict=True)), keys, what)

    def _known(self, events: dict[Hashable, Any], keys: list[Hashable], what: str) -> list[np.ndarray]:
        """Tokens by key; those not kept are made, all that give the same columns at once."""
        forms: dict[tuple[str, ...] | None, list[Hashable]] = {}
        for key, event in events.items():
            if key not in self._tokens:
                forms.setdefault(None if isinstance(event, str) else tuple(event), []).append(key)
        found: dict[Hashable, np.ndarray] = {}
        for given, group in forms.items():
            flat, offsets = self.vocabulary.tokens(self._texts([events[key] for key in group], given, what))
            for i, key in enumerate(group):
                found[key] = np.concatenate([flat[offsets[i] : offsets[i + 1]], self.vocabulary.marker])
        result = [found[key] if key in found else self._tokens[key] for key in keys]
        for key, tokens in zip(keys, result, strict=True):
            self._keep(key, tokens)
        return result

    def _keep(self, key: Hashable, tokens: np.ndarray) -> None:
        self._tokens[key] = tokens
        self._tokens.move_to_end(key)
        if len(self._tokens) > KNOWN_EVENTS:
            self._tokens.popitem(last=False)

    def _texts(self, events: list[Any], given: tuple[str, ...] | None, what: str) -> list[str]:
        """Texts of events that give the same columns, or of ids (None); the item table has the rest."""
        names = [name for name in self.domain.event_columns if name not in (given or ())]
        stored = self._stored(events, names, given, what) if names else {}
        if given is None:
            return self.vocabulary.events(stored).to_pylist()
        columns = {name: python_values(values, name) for name, values in stored.items()}
        return [
            fill(self.domain.event, event | {name: columns[name][row] for name in names}, self.vocabulary.forbidden)
            for row, event in enumerate(events)
        ]

    def _stored(
        self, events: list[Any], names: list[str], given: tuple[str, ...] | None, what: str
    ) -> dict[str, pa.Array]:
        """The item table's columns [events] of these names."""
        if given is not None and "item_id" not in given:
            raise DataError(
                f"{what}: event {quoted(events[0])} lacks {listed(names)}, which the template of domain "
                f"{self.domain.name!r} names; give it, or an item_id of the item table"
            )
        ids = [event if given is None else event["item_id"] for event in events]
        rows = self.catalogue.rows(ids, what)
        missing = [name for name in names if name not in self.catalogue.column_names]
        if missing:
            raise DataError(
                f"{what}: item {quoted(ids[0])} has no column {listed(missing)}, which the template of domain "
                f"{self.domain.name!r} names; give the event as {{'item_id': ..., {missing[0]!r}: ...}}"
            )
        return {name: self.catalogue.take(name, rows) for name in names}

    def dropped(self, prefix: Prefix, probes: Sequence[np.ndarray], first: int = 0) -> np.ndarray:
        """How many of the oldest history events each probe leaves out to fit `stream.max_length`, int64 [probes].

        It depends on the probe itself and on no other, so that an answer is the same whatever it is asked with.
        Messages count the probes from `first`.

        Raises:
            StreamError: a probe that does not fit even without history.
        """
        return events_to_drop(
            prefix.header, prefix.events, probes, len(self.vocabulary.suffix), self.domain.stream.max_length,
            self.domain.name, first,
        )  # fmt: skip
