"""Rows of a log as the events of requests to a scorer, rendered as in training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.rendering import python_values
from llmrec_peft.requests.request import Event


class LoggedEvents:
    """Histories and candidates of one log for one domain.

    Attributes:
        moment: columns that the event names and the item table lacks: they belong to a row of the interactions.
        classes: int [rows], the class of each row, -1 where the domain's label rule leaves it out.
    """

    def __init__(self, log: BehaviorLog, domain: Domain) -> None:
        self._log, self._labels = log, domain.labels
        self._ids: list[str] = log.items.column("item_id").to_pylist()
        self.moment = [name for name in domain.event_columns if name not in log.items.column_names]
        self.classes: np.ndarray = domain.classes(log)

    def history(self, user: int, until: float | None = None) -> list[tuple[Event, str]]:
        """(event, label) of a user (by code), strictly before a moment, in time order, without unlabelled rows."""
        rows = np.arange(self._log.user_offsets[user], self._log.user_offsets[user + 1])
        rows = rows[self.classes[rows] >= 0]
        if until is not None:
            rows = rows[self._log.timestamps[rows] < until]
        events = self.events(self._log.item_codes[rows], self.moments(rows))
        return [(event, self._labels[number]) for event, number in zip(events, self.classes[rows], strict=True)]

    def moments(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The columns `moment` of rows of the log; empty mappings where the event names no such column."""
        if not self.moment:
            return [{}] * len(rows)
        taken = self._log.interactions.select(self.moment).take(pa.array(rows)).combine_chunks()
        columns = [cells(taken.column(name), name) for name in self.moment]
        return [dict(zip(self.moment, own, strict=True)) for own in zip(*columns, strict=True)]

    def events(self, codes: np.ndarray, moments: Sequence[Mapping[str, Any]]) -> list[Event]:
        """Events of items (codes [n]) at their moments [n]; an id is enough where the event names no such column."""
        if not self.moment:
            return [self._ids[code] for code in codes]
        return [{"item_id": self._ids[code], **own} for code, own in zip(codes, moments, strict=True)]

    def first(self, user: int, column: str) -> Any:
        """Value of the user's first row in a column of the interactions, which training writes into the header."""
        return cells(self._log.column(column).slice(int(self._log.user_offsets[user]), 1), column)[0]


def cells(column: pa.ChunkedArray, name: str) -> list[Any]:
    """A column's values as templates write them; see `rendering.python_values`."""
    return [value for chunk in column.chunks for value in python_values(chunk, name)]
