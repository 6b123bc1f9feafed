"""What a request may hold, checked and made plain before anything is computed: the one door of all scorers.

Whatever a caller gives, our own errors come out: texts, numbers, dates and lists pass as plain Python (see
`data.values`), and everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrec_peft.data.titles import title_fault
from llmrec_peft.data.values import MAX_BITS, plain
from llmrec_peft.documents import has_surrogates
from llmrec_peft.errors import DataError, LLMRecError, input_errors
from llmrec_peft.messages import listed, quoted

Event = str | int | Mapping[str, Any]
"""An item id of the item table, or a mapping of the columns that the domain's template names."""
_ADVICE = "give plain lists, mappings, texts and numbers"


@dataclass(frozen=True)
class RequestRules:
    """What the requests of one domain may hold.

    domain: its name. labels: in class order. event_columns, header_columns: what its templates name.
    """

    domain: str
    labels: Sequence[str]
    event_columns: Sequence[str]
    header_columns: Sequence[str]

    def pairs(self, history: Any) -> list[tuple[str | dict[str, Any], str]]:
        """The (event, label) of a history, events as `events` returns them.

        Raises:
            DataError: no list, an entry that is no pair or no event, or a label that the domain does not have.
        """
        with input_errors(DataError, "history", _ADVICE):
            check_list("history", history)
            return [self._pair(entry, place) for place, entry in enumerate(history)]

    def events(self, events: Any, what: str, first: int = 0) -> list[str | dict[str, Any]]:
        """Events: an item id as text, or the plain values of the template's columns (and of `item_id`) that it gives.

        Messages count the entries from `first`.

        Raises:
            DataError: no list, an entry that is neither an id nor a mapping, a title that nobody can read, or a value
                that is beyond a number's limits.
            DomainError: a value that is no text, number, date or list of these.
        """
        with input_errors(DataError, what, _ADVICE):
            check_list(what, events)
            return [self._event(event, place, what) for place, event in enumerate(events, first)]

    def user(self, user: Any) -> dict[str, Any]:
        """The plain values of the header's columns. Raises DataError for no mapping, or a column that is missing."""
        columns = self.header_columns
        with input_errors(DataError, "user", _ADVICE):
            if not isinstance(user, Mapping | None):
                raise DataError(f"user must be a mapping of columns, not {quoted(user)}; give {listed(list(columns))}")
            missing = [name for name in columns if user is None or name not in user]
            if missing:
                raise DataError(
                    f"user lacks {listed(missing)}, which the header of domain {self.domain!r} names; "
                    f"give user={{{missing[0]!r}: ...}}"
                )
            return {name: plain(name, user[name]) for name in columns}

    def _pair(self, entry: Any, place: int) -> tuple[str | dict[str, Any], str]:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise DataError(f"history: entry {place} must be a pair (event, label), not {quoted(entry)}; correct it")
        event, label = entry
        if not isinstance(label, str) or label not in self.labels:
            raise DataError(
                f"history: entry {place} has the label {quoted(label)}, which domain {self.domain!r} does not have; "
                f"use one of {listed(list(self.labels))}"
            )
        return self._event(event, place, "history"), str(label)

    def _event(self, event: Any, place: int, what: str) -> str | dict[str, Any]:
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
            given |= {name: plain(name, event[name]) for name in self.event_columns
                      if name in event and name not in given}  # fmt: skip
        except LLMRecError as error:
            raise type(error)(f"{what}: entry {place}: {error}") from None
        fault = title_fault(given["title"]) if "title" in given else None
        if fault:
            raise DataError(f"{what}: entry {place} {fault}; give the item's title as a text")
        return given


def item_id(value: Any, what: str) -> str:
    """An item id as text; `what` is the thing that names the item.

    Raises:
        DataError: neither a text nor a whole number, half a surrogate pair, or more than 64 bits.
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


def check_list(what: str, value: Any) -> None:
    """Raise DataError for what is no list; a text, bytes and a mapping are none."""
    wrong = isinstance(value, str | bytes | bytearray | memoryview | Mapping)
    if wrong or not isinstance(value, Sequence | np.ndarray) or (isinstance(value, np.ndarray) and not value.ndim):
        raise DataError(f"{what} must be a list, not {quoted(value)}; correct it")


def listed_requests(what: str, values: Any) -> list[Any]:
    """Any iterable of requests as a list. Raises DataError for what is none; a text and a mapping are none."""
    with input_errors(DataError, what, "give a list of tuples"):
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise DataError(f"{what} must be a list, not {quoted(values)}; correct it")
        return list(values)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return not isinstance(value, bool) and isinstance(value, int | np.integer) and value >= 1


def check_count(what: str, value: Any, error: type[LLMRecError], advice: str) -> None:
    """Raise `error` for what is no whole number of at least 1."""
    if not is_count(value):
        raise error(f"{what} must be at least 1 and whole, not {quoted(value)}; {advice}")
