"""The part of a domain that encoding a request needs, whether it comes from a bundle or from an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmrec_peft.data.templates import template_columns

if TYPE_CHECKING:
    from llmrec_peft.data.domain import Domain


@dataclass(frozen=True)
class RequestDomain:
    """Templates, labels and window of one domain.

    Attributes:
        name: name of the domain, for error messages.
        event, header: templates.
        labels: label names, in class order.
        history_labels: labels whose events stay in the history.
        window: history events that are used at most.
        stride: events by which the window moves (see `layout.window_start`).
        max_length: tokens of a prefix with one candidate, at most.
    """

    name: str
    event: str
    header: str
    labels: tuple[str, ...]
    history_labels: frozenset[str]
    window: int
    stride: int
    max_length: int

    @classmethod
    def of(cls, domain: Domain) -> RequestDomain:
        """The part of a training domain."""
        stream = domain.stream
        return cls(
            name=domain.name,
            event=domain.event,
            header=domain.header,
            labels=tuple(domain.labels),
            history_labels=frozenset(domain.labels if stream.history_labels is None else stream.history_labels),
            window=stream.context + stream.targets - 1,
            stride=max(1, stream.targets // 3),
            max_length=stream.max_length,
        )

    @property
    def event_columns(self) -> list[str]:
        """Columns that the event's template names, in order."""
        return template_columns(self.event)

    @property
    def header_columns(self) -> list[str]:
        """Columns that the header's template names, in order."""
        return template_columns(self.header)
