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
from llmrec_peft.data.tables import listed, shorten
from llmrec_peft.data.tokens import Vocabulary
from llmrec_peft.errors import DataError
from llmrec_peft.inference.catalogue import Catalogue
from llmrec_peft.serving.prompts import Event, check_event, check_list, events_to_drop, value_key

KNOWN_EVENTS = 200_000
"""Texts whose tokens are kept; beyond, those that were not asked for the longest go."""


@dataclass(frozen=True)
class Trunk:
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
        self._tokens: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    # -- what a caller gives -------------------------------------------------------------------

    def trunk(self, history: Sequence[tuple[Event, str]], user: Mapping[str, Any] | None = None) -> Trunk:
        """Tokens of a header and of the newest events that a window has room for by number.

        Args:
            history: (event, label) in time order, any number of them.
            user: columns that the domain's header names.

        Raises:
            DataError: an unknown item or label, a pair that is none, or a column that is missing.
        """
        pairs = self.pairs(history)
        # Also before the window: whether an id is known must not depend on how much came after it.
        self.catalogue.rows([str(event) for event, _ in pairs if not isinstance(event, Mapping)], "history")
        seen = [(place, event, label) for place, (event, label) in enumerate(pairs) if label in self._joins]
        seen = seen[window_start(len(seen), self.window, self.stride) :]
        texts = self.events([event for _, event, _ in seen], "history")
        words = self.vocabulary.outcomes
        events = tuple(
            np.concatenate([tokens, words[self._classes[label]]])
            for tokens, (_, _, label) in zip(texts, seen, strict=True)
        )
        return Trunk(np.concatenate([self.vocabulary.prefix, self._header(user)]), events)

    def pairs(self, history: Sequence[tuple[Event, str]]) -> list[tuple[Event, str]]:
        """The entries of a history.

        Raises:
            DataError: no list, an entry that is no pair or no event, or a label that the domain does not have.
        """
        check_list("history", history)
        return [self._pair(entry, place) for place, entry in enumerate(history)]

    def _pair(self, entry: Any, place: int) -> tuple[Event, str]:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise DataError(f"history: entry {place} must be a pair (event, label), not {shorten(entry)}; correct it")
        event, label = entry
        if not isinstance(label, str) or label not in self._classes:
            raise DataError(
                f"history: entry {place} has the label {shorten(label)}, which domain {self.domain.name!r} does not "
                f"have; use one of {listed(self.domain.labels)}"
            )
        check_event(event, place, "history")
        return event, label

    def _header(self, user: Mapping[str, Any] | None) -> np.ndarray:
        columns, user = self.domain.header_columns, {} if user is None else user
        if not isinstance(user, Mapping):
            raise DataError(f"user must be a mapping of columns, not {shorten(user)}; give {listed(columns)}")
        missing = [name for name in columns if name not in user]
        if missing:
            raise DataError(
                f"user lacks {listed(missing)}, which the header of domain {self.domain.name!r} names; "
                f"give user={{{missing[0]!r}: ...}}"
            )
        values = {name: _array([user[name]]) for name in columns}
        key = ("header", *(value_key(user[name]) for name in columns))
        with self._lock:
            if key not in self._tokens:
                self._keep(key, self.vocabulary.tokens(self.vocabulary.headers(values, 1).to_pylist())[0])
            return self._tokens[key]

    def events(self, events: Sequence[Event], what: str) -> list[np.ndarray]:
        """Tokens of events with their markers; `what` says in messages where they stood.

        Raises:
            DataError: an unknown item, or a column that the template names and neither the event nor the table has.
        """
        keys = [self._event_key(event, place, what) for place, event in enumerate(events)]
        with self._lock:
            return self._known(dict(zip(keys, events, strict=True)), keys, what)

    def _known(self, events: dict[Hashable, Event], keys: list[Hashable], what: str) -> list[np.ndarray]:
        """Tokens by key; those not kept are made, all that give the same columns at once."""
        fresh = {key: event for key, event in events.items() if key not in self._tokens}
        # Of one type each: in a column with 2.5, a 3 would read 3.0, and alone it reads 3.
        forms: dict[tuple[tuple[str, ...], tuple[type, ...]], list[Hashable]] = {}
        for key, event in fresh.items():
            given = tuple(sorted(event)) if isinstance(event, Mapping) else ()
            forms.setdefault((given, tuple(type(event[name]) for name in given)), []).append(key)
        found: dict[Hashable, np.ndarray] = {}
        for (given, _), group in forms.items():
            texts = self.vocabulary.events(self._columns([fresh[key] for key in group], given, what))
            flat, offsets = self.vocabulary.tokens(texts.to_pylist())
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

    def _event_key(self, event: Any, place: int, what: str) -> Hashable:
        """What an event's text depends on."""
        check_event(event, place, what)
        if isinstance(event, Mapping):
            return ("columns", *sorted((str(name), value_key(value)) for name, value in event.items()
                                       if name == "item_id" or name in self.domain.event_columns))  # fmt: skip
        return ("item", str(event))

    def _columns(self, events: list[Event], given: tuple[str, ...], what: str) -> dict[str, pa.Array]:
        """The template's columns [events] for events that give the same columns; the item table has the rest."""
        wanted = self.domain.event_columns
        rest = [name for name in wanted if name not in given]
        columns = {name: _array([event[name] for event in events]) for name in wanted if name in given}
        if not rest:
            return columns
        if given and "item_id" not in given:
            raise DataError(
                f"{what}: event {shorten(dict(events[0]))} lacks {listed(rest)}, which the template of domain "
                f"{self.domain.name!r} names; give it, or an item_id of the item table"
            )
        ids = [str(event["item_id"]) if given else str(event) for event in events]
        rows = self.catalogue.rows(ids, what)
        missing = [name for name in rest if name not in self.catalogue.column_names]
        if missing:
            raise DataError(
                f"{what}: item {shorten(ids[0])} has no column {listed(missing)}, which the template of domain "
                f"{self.domain.name!r} names; give the event as {{'item_id': ..., {missing[0]!r}: ...}}"
            )
        return columns | {name: self.catalogue.take(name, rows) for name in rest}

    def dropped(self, trunk: Trunk, probes: Sequence[np.ndarray]) -> np.ndarray:
        """How many of the oldest history events each probe leaves out to fit `stream.max_length`, int64 [probes].

        It depends on the probe itself and on no other, so that an answer is the same whatever it is asked with.

        Raises:
            StreamError: a probe that does not fit even without history.
        """
        return events_to_drop(
            trunk.header, trunk.events, probes, len(self.vocabulary.suffix), self.domain.stream.max_length,
            self.domain.name,
        )  # fmt: skip


def _array(values: list[Any]) -> pa.Array:
    """Values of one column; of mixed types, as texts."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
