"""Tokens of the headers and events of one split, each different text tokenised once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llmrec_peft.data.events import Events
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.token_table import CHUNK, TokenTable
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import DomainError


@dataclass(frozen=True)
class EventTokens:
    """Tokens of headers and events; E, P: see `Events`; N negatives beside a target event.

    Attributes:
        table: tokens of the events' texts.
        event_text: int64 [E], the text of each event.
        negative_text: int64 [P, N], the text of each sampled negative; -1 for none.
        headers: tokens of one header for all users, or of one for each user.
    """

    table: TokenTable
    event_text: np.ndarray
    negative_text: np.ndarray
    headers: TokenTable

    def event(self, event: int) -> np.ndarray:
        """Tokens of an event, int32."""
        return self.table[self.event_text[event]]

    def header(self, user: int) -> np.ndarray:
        """Tokens of a user's header, int32."""
        return self.headers[self.header_number(user)]

    def header_number(self, user: int) -> int:
        """Number of a user's header in `headers`."""
        return user if len(self.headers) > 1 else 0


def tokenise_events(
    log: BehaviorLog, vocabulary: Vocabulary, events: Events, negatives: np.ndarray, name: str
) -> EventTokens:
    """Tokenise the headers and events of one split.

    Args:
        negatives: int32 [P, N], item of each sampled negative; -1 for none.
        name: name of the split, for the progress bar.

    Raises:
        DomainError: a template names a column that the log lacks.
        DataError: a text has no tokens in a vocabulary of item ids.
    """
    columns = vocabulary.domain.event_columns
    taken = negatives >= 0
    # A negative has the item of its draw and, for columns of the interactions, the row of its target event.
    rows = np.concatenate([events.rows, np.repeat(events.rows[events.targets], taken.sum(1))])
    items = np.concatenate([log.item_codes[events.rows], negatives[taken]])
    if set(columns) <= set(log.items.column_names):
        # The text depends on the item alone, so each item is tokenised once.
        items, numbers = np.unique(items, return_inverse=True)
        rows = np.zeros(len(items), np.int64)
    else:
        numbers = np.arange(len(rows))
    slices = [slice(start, start + CHUNK) for start in range(0, len(items), CHUNK)]
    chunks = (
        vocabulary.events({column: _column(log, vocabulary, column, rows[s], items[s]) for column in columns})
        for s in slices
    )
    table = TokenTable.build(vocabulary, chunks, len(items), f"{name} events")
    negative_text = np.full(negatives.shape, -1, np.int64)
    negative_text[taken] = numbers[len(events) :]
    return EventTokens(table, numbers[: len(events)], negative_text, _headers(log, vocabulary, name))


def _column(log: BehaviorLog, vocabulary: Vocabulary, name: str, rows: np.ndarray, items: np.ndarray) -> pa.Array:
    """A template's column [n] for pairs of interaction and item; the item table's comes first."""
    if name in log.items.column_names:
        return take_array(log.items.column(name), items)
    if name in log.interactions.column_names:
        return take_array(log.interactions.column(name), rows)
    raise DomainError(
        f"domain '{vocabulary.domain.name}': event names the column '{name}', which neither the items "
        f"({', '.join(log.items.column_names)}) nor the interactions "
        f"({', '.join(log.interactions.column_names)}) have; correct the template"
    )


def _headers(log: BehaviorLog, vocabulary: Vocabulary, name: str) -> TokenTable:
    """One header for all users, or one for each user from the columns of the user's first interaction."""
    columns, first = vocabulary.domain.header_columns, log.user_offsets[:-1]
    known = log.interactions.column_names
    for column in columns:
        if column not in known:
            raise DomainError(
                f"domain '{vocabulary.domain.name}': header names the column '{column}', which the interactions "
                f"({', '.join(known)}) do not have; correct the template"
            )
    count = len(first) if columns else 1
    slices = [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    chunks = (
        vocabulary.headers(
            {column: take_array(log.interactions.column(column), first[s]) for column in columns}, s.stop - s.start
        )
        for s in slices
    )
    return TokenTable.build(vocabulary, chunks, count, f"{name} headers")


def take_array(column: pa.ChunkedArray, rows: np.ndarray) -> pa.Array:
    """Rows [n] of a column as one array."""
    taken = column.take(pa.array(rows))
    return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken
