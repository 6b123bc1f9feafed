"""Validation of requests, the same for every scorer.

Texts, numbers, dates and lists become plain Python values (see `data.values`). Everything else raises an error of this
package that names the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from llmrec_peft.data.titles import title_fault
from llmrec_peft.data.values import MAX_BITS, plain
from llmrec_peft.documents import has_surrogates
from llmrec_peft.errors import DataError, LLMRecError, input_errors
from llmrec_peft.messages import listed, quoted
from llmrec_peft.requests.argument_checks import check_list
from llmrec_peft.requests.request_domain import RequestDomain

PlainEvent: TypeAlias = str | dict[str, Any]
"""An item id, or plain values of the columns that the template names (and of `item_id`)."""
_ADVICE = "give plain lists, mappings, texts and numbers"


class RequestRules:
    """What requests of one domain may contain."""

    def __init__(self, domain: RequestDomain) -> None:
        self._domain, self._labels = domain.name, domain.labels
        self._event_columns, self._header_columns = domain.event_columns, domain.header_columns

    def pairs(self, history: Any) -> list[tuple[PlainEvent, str]]:
        """The (event, label) pairs of a history; events as `events` returns them.

        Raises:
            DataError: not a list, an entry that is not a pair of an event and a label, or an unknown label.
        """
        with input_errors(DataError, "history", _ADVICE):
            check_list("history", history)
            return [self._pair(entry, place) for place, entry in enumerate(history)]

    def events(self, events: Any, what: str, first: int = 0) -> list[PlainEvent]:
        """Checked events: each an item id as text, or the plain values that it gives for the template's columns.

        Args:
            events: events of a request.
            what: names them in messages.
            first: number of the first one in messages.

        Raises:
            DataError: not a list, an entry that is neither an id nor a mapping, a title without a visible character,
                or a number that is too large.
            DomainError: a value that is not a text, number, date or list of these.
        """
        with input_errors(DataError, what, _ADVICE):
            check_list(what, events)
            return [self._event(event, place, what) for place, event in enumerate(events, first)]

    def user(self, user: Any) -> dict[str, Any]:
        """Plain values of the header's columns. Raises DataError if `user` is not a mapping or lacks a column."""
        columns = self._header_columns
        with input_errors(DataError, "user", _ADVICE):
            if user is not None and not isinstance(user, Mapping):
                raise DataError(f"user must be a mapping of columns, not {quoted(user)}; give {listed(columns)}")
            given: Mapping[str, Any] = {} if user is None else user
            missing = [name for name in columns if name not in given]
            if missing:
                raise DataError(
                    f"user lacks {listed(missing)}, which the header of domain {self._domain!r} names; "
                    f"give user={{{missing[0]!r}: ...}}"
                )
            return {name: plain(name, given[name]) for name in columns}

    def _pair(self, entry: Any, place: int) -> tuple[PlainEvent, str]:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise DataError(f"history: entry {place} must be a pair (event, label), not {quoted(entry)}; correct it")
        event, label = entry
        if not isinstance(label, str) or label not in self._labels:
            raise DataError(
                f"history: entry {place} has the label {quoted(label)}, which domain {self._domain!r} does not have; "
                f"use one of {listed(list(self._labels))}"
            )
        return self._event(event, place, "history"), str(label)

    def _event(self, event: Any, place: int, what: str) -> PlainEvent:
        if not isinstance(event, Mapping):
            if isinstance(event, bool) or not isinstance(event, str | int | np.integer):
                raise DataError(
                    f"{what}: entry {place} must be an item id or a mapping of columns, not {quoted(event)}; correct it"
                )
            return item_id(event, f"{what}: entry {place}")
        given = {}
        if "item_id" in event and event["item_id"] is not None:
            given["item_id"] = item_id(event["item_id"], f"{what}: entry {place}")
        try:
            given |= {name: plain(name, event[name]) for name in self._event_columns
                      if name in event and name not in given}  # fmt: skip
        except LLMRecError as error:
            raise type(error)(f"{what}: entry {place}: {error}") from None
        fault = title_fault(given["title"]) if "title" in given else None
        if fault:
            raise DataError(f"{what}: entry {place} {fault}; give the item's title as a text")
        return given


def item_id(value: Any, what: str) -> str:
    """An item id as text; `what` names its place in the request, for messages.

    Raises:
        DataError: neither a text nor a whole number, half of a surrogate pair, or more than 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise DataError(f"{what} has the item id {quoted(value)}; ids are texts or whole numbers: correct it")
    if isinstance(value, str):
        value = str.__str__(value)
        if has_surrogates(value):
            raise DataError(f"{what} has the item id {quoted(value)} with half a surrogate pair; correct it")
        return value
    if int(value).bit_length() > MAX_BITS:
        raise DataError(f"{what} has {quoted(value)} as item id, more than {MAX_BITS} bits; write it as a text")
    return str(int(value))
