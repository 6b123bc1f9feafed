"""From a history and its candidates to tokens, the same as `scoring.prompts` makes, without Arrow."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrec_peft.data.layout import window_start
from llmrec_peft.data.templates import check_template, fill, template_columns
from llmrec_peft.data.values import value_key
from llmrec_peft.errors import DataError, StreamError
from llmrec_peft.messages import listed, quoted
from llmrec_peft.serving.plain_items import Items
from llmrec_peft.serving.plain_vocabulary import Words
from llmrec_peft.serving.request_rules import RequestRules

Event = str | dict[str, Any]
"""An item id of the item table, or plain values of the columns that the domain's template names."""


@dataclass(frozen=True)
class Ask:
    """One request as tokens.

    Attributes:
        header: int32 tokens before the events.
        events: int32 tokens of each history event with its outcome.
        probes: int32 tokens of each candidate with its marker.
        dropped: int64 [probes], how many of the oldest history events each leaves out to fit `stream.max_length`.
    """

    header: np.ndarray
    events: tuple[np.ndarray, ...]
    probes: list[np.ndarray]
    dropped: np.ndarray

    def prefix(self, dropped: int) -> np.ndarray:
        """Tokens of the header and the events without the oldest `dropped`."""
        return np.concatenate([self.header, *self.events[dropped:]])


class Prompts:
    """One domain's words for the items of one table, and the tokens of what was asked for before.

    Args:
        manifest: serving.json.
        words: the domain's tokens.
        items: the item table, or None.
        kept: texts whose tokens are kept; where more come, all that were kept go.

    Raises:
        DomainError: a template that cannot be filled.
    """

    def __init__(self, manifest: Mapping[str, Any], words: Words, items: Items | None, kept: int) -> None:
        domain, window = manifest["domain"], manifest["window"]
        self.words, self.items = words, items
        self.name, self.labels = domain["name"], list(domain["outcomes"])
        self._event, self._header_template = domain["event"], domain["header"]
        for key in ("event", "header"):
            check_template(domain[key], f"domain '{self.name}': {key}")
        self._event_columns = template_columns(self._event)
        self._header_columns = template_columns(self._header_template)
        self._events, self._stride, self._max_length = window["events"], window["stride"], window["max_length"]
        joining = domain["stream"].get("history_labels")
        self._joins = set(self.labels if joining is None else joining)
        self._classes = {label: number for number, label in enumerate(self.labels)}
        self._rules = RequestRules(self.name, self.labels, self._event_columns, self._header_columns)
        self._lock, self._kept = threading.Lock(), kept
        self._tokens: dict[Hashable, np.ndarray] = {}

    def ask(self, history: Any, candidates: Any, user: Mapping[str, Any] | None = None) -> Ask:
        """One request as tokens.

        Raises:
            DataError: an unknown item or label, a column that is missing, or what `RequestRules` refuses.
            DomainError: a value that no template can show, or that does not fit its format.
            StreamError: a candidate that does not fit the window.
        """
        candidates, history = self._rules.events(candidates, "candidates"), self._rules.pairs(history)
        events, header = self._prefix(history), self._header(self._rules.user(user))
        probes = self._texts(candidates, "candidates")
        suffix = len(self.words.suffix)
        return Ask(header, events, probes, events_to_drop(header, events, probes, suffix, self._max_length, self.name))

    # -- history -------------------------------------------------------------------------------

    def _prefix(self, pairs: list[tuple[Event, str]]) -> tuple[np.ndarray, ...]:
        # Also before the window: whether an id is known must not depend on how much came after it.
        ids = [event for event, _ in pairs if isinstance(event, str)]
        if self._is_text_of_ids():
            self._texts(ids, "history")
        else:
            self._check_known(ids, "history")
        seen = [pair for pair in pairs if pair[1] in self._joins]
        seen = seen[window_start(len(seen), self._events, self._stride) :]
        texts = self._texts([event for event, _ in seen], "history")
        outcomes = [self.words.outcomes[self._classes[label]] for _, label in seen]
        return tuple(np.concatenate(pair) for pair in zip(texts, outcomes, strict=True))

    def _header(self, user: Mapping[str, Any]) -> np.ndarray:
        columns = self._header_columns
        key = ("header", *(value_key(user[name]) for name in columns))
        with self._lock:
            found = self._tokens.get(key)
            if found is None:
                text = fill(self._header_template, user, self.words.forbidden) if columns else self._header_template
                found = np.concatenate([self.words.prefix, *self.words.tokens([text])])
                self._keep({key: found})
        return found

    # -- events --------------------------------------------------------------------------------

    def _texts(self, events: Sequence[Event], what: str) -> list[np.ndarray]:
        """Tokens of events with their markers; those not kept are made at once."""
        keys = [event_key(event) for event in events]
        with self._lock:
            found = {key: self._tokens.get(key) for key in keys}
            fresh = {key: event for key, event in zip(keys, events, strict=True) if found[key] is None}
            if fresh:
                made = self.words.tokens(self._filled(list(fresh.values()), what))
                new = {key: np.concatenate([ids, self.words.marker]) for key, ids in zip(fresh, made, strict=True)}
                found |= new
                self._keep(new)
        return [found[key] for key in keys]

    def _keep(self, new: dict[Hashable, np.ndarray]) -> None:
        if len(self._tokens) + len(new) > self._kept:
            self._tokens = {}
        if len(new) <= self._kept:
            self._tokens |= new

    def _filled(self, events: list[Event], what: str) -> list[str]:
        """Texts of events; the item table has the columns that they do not give."""
        parts = [self._parts(event, what) for event in events]
        self._check_known([item for _, item in parts if item is not None], what)
        texts = []
        for given, item in parts:
            columns = given if item is None else self._completed(given, item, what)
            texts.append(fill(self._event, columns, self.words.forbidden))
        return texts

    def _parts(self, event: Event, what: str) -> tuple[Mapping[str, Any], str | None]:
        """Columns that an event gives, and the item that has the rest of the template's, if it needs one."""
        if isinstance(event, str):
            return ({"item_id": event}, None) if self._is_text_of_ids() else ({}, event)
        rest = [name for name in self._event_columns if name not in event]
        if rest and "item_id" not in event:
            raise DataError(
                f"{what}: event {quoted(event)} lacks {listed(rest)}, which the template of domain "
                f"{self.name!r} names; give it, or an item_id of the item table"
            )
        return event, event["item_id"] if rest else None

    def _completed(self, given: Mapping[str, Any], item: str, what: str) -> dict[str, Any]:
        missing = [name for name in self._event_columns if name not in given and name not in self.items.columns]
        if missing:
            raise DataError(
                f"{what}: item {quoted(item)} has no column {listed(missing)}, which the template of domain "
                f"{self.name!r} names; give the event as {{'item_id': ..., {missing[0]!r}: ...}}"
            )
        stored = self.items[item]
        return {name: given[name] if name in given else stored.get(name) for name in self._event_columns}

    def _is_text_of_ids(self) -> bool:
        """Whether an id needs no table: its own token is all that the model reads."""
        return self.items is None and self._event_columns == ["item_id"]

    def _check_known(self, ids: Sequence[str], what: str) -> None:
        missing = [item for item in ids if self.items is None or item not in self.items]
        if missing:
            known = (
                "since no item table was given" if self.items is None
                else f"among the {len(self.items):,} items of {self.items.name}"
            )  # fmt: skip
            raise DataError(
                f"{what}: item {quoted(missing[0])} is unknown {known} ({len(missing)} such); add it to the table, or "
                "give its columns as a mapping"
            )


def events_to_drop(
    header: np.ndarray,
    events: Sequence[np.ndarray],
    probes: Sequence[np.ndarray],
    suffix: int,
    limit: int,
    name: str,
    first: int = 0,
) -> np.ndarray:
    """How many of the oldest history events each probe leaves out to fit `limit` tokens, int64 [probes].

    It depends on the probe itself and on no other, so that an answer is the same whatever it is asked with.

    Args:
        header: int32 tokens before the events.
        events: int32 tokens of each event.
        probes: int32 tokens of each candidate with its marker.
        suffix: how many tokens follow a probe.
        limit: stream.max_length of the domain.
        name: the domain's.
        first: number of the first probe in messages.

    Raises:
        StreamError: a probe that does not fit even without history.
    """
    sizes = np.array([0, *map(len, events)])
    total = np.cumsum(sizes)
    rest = len(header) + total[-1] - total  # tokens of the prefix without the oldest 0, 1, 2, ... events
    lengths = np.fromiter(map(len, probes), np.int64, len(probes)) + suffix
    over = np.flatnonzero(lengths + rest[-1] > limit)
    if len(over):
        raise StreamError(
            f"candidate {first + over[0]} takes {lengths[over[0]]} tokens and the header {rest[-1]}, but "
            f"stream.max_length of domain {name!r} is {limit}; shorten the item's text"
        )
    return np.searchsorted(-rest, lengths - limit, "left")


def event_key(event: Event) -> Hashable:
    """What an event's text depends on; events are as `RequestRules.events` returns them."""
    if isinstance(event, str):
        return event
    return ("columns", *sorted((name, *value_key(value)) for name, value in event.items()))
