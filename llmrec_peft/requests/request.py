"""A request as a caller gives it. Nothing in it is checked yet: `RequestEncoder` does that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from llmrec_peft.errors import DataError, LLMRecError, input_errors
from llmrec_peft.messages import quoted
from llmrec_peft.requests.argument_checks import as_list, check_list

Event: TypeAlias = str | int | Mapping[str, Any]
"""An item id of the item table, or a mapping of the columns that the domain's template names."""
History: TypeAlias = Sequence[tuple[Event, str]]
"""(event, label) in time order."""


@dataclass(frozen=True)
class Request:
    """One history and the candidates to score after it.

    Attributes:
        history: (event, label) in time order.
        candidates: events; each is scored as if it were the only one.
        user: columns that the domain's header names.
        domain: name of the domain in a bank.
        name: start of the error messages about this request, such as "request 3: ".
    """

    history: History
    candidates: Sequence[Event]
    user: Mapping[str, Any] | None = None
    domain: str = ""
    name: str = ""

    def count(self) -> int:
        """Number of candidates. Raises DataError if they are not a list."""
        with self.named(), input_errors(DataError, "candidates", "give a list of events"):
            check_list("candidates", self.candidates)
            return len(self.candidates)

    def chunks(self, size: int, count: int) -> Iterator[tuple[int, list[Event]]]:
        """The first `count` candidates in chunks of `size`, each with the number of its first candidate.

        Raises:
            DataError: the list has become shorter than `count`.
        """
        events = iter(self.candidates)
        for first in range(0, count, size):
            chunk = list(islice(events, min(size, count - first)))
            if len(chunk) < min(size, count - first):
                raise DataError(
                    f"{self.name}candidates: {count} were given, and only {first + len(chunk)} are left; do not change "
                    "the list before the call returns"
                )
            yield first, chunk

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the request's name in front of error messages."""
        try:
            yield
        except LLMRecError as error:
            if not self.name:
                raise
            raise type(error)(f"{self.name}{error}") from None


def scorer_requests(values: Any, domain: str = "") -> list[Request]:
    """Requests of one domain, each given as (history, candidates) or (history, candidates, user).

    Raises:
        DataError: not a list, or an entry of another form.
    """
    requests = []
    for number, value in enumerate(as_list("requests", values)):
        if not isinstance(value, list | tuple) or len(value) not in (2, 3):
            raise DataError(f"request {number} must be (history, candidates) or (history, candidates, user)")
        history, candidates, *user = value
        requests.append(Request(history, candidates, user[0] if user else None, domain, f"request {number}: "))
    return requests


def bank_requests(values: Any) -> list[Request]:
    """Requests of many domains, each given as (domain, history, candidates) or (domain, history, candidates, user).

    Raises:
        DataError: not a list, an entry of another form, or a domain that is not a text.
    """
    requests = []
    for number, value in enumerate(as_list("requests", values)):
        if not isinstance(value, list | tuple) or len(value) not in (3, 4):
            raise DataError(
                f"request {number} must be (domain, history, candidates) or (domain, history, candidates, user), "
                f"not {quoted(value)}; correct it"
            )
        domain, history, candidates, *user = value
        if not isinstance(domain, str):
            raise DataError(f"request {number} has the domain {quoted(domain)}, which is not text; correct it")
        name = f"request {number} ({domain}): "
        requests.append(Request(history, candidates, user[0] if user else None, domain, name))
    return requests
