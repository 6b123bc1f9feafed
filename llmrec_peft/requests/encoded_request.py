"""A request as tokens.

All arrays of tokens are int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrec_peft.errors import StreamError


@dataclass(frozen=True)
class Prefix:
    """Tokens that all candidates of a request see.

    Attributes:
        header: BOS and the header.
        events: each event of the history with its marker and its outcome.
    """

    header: np.ndarray
    events: tuple[np.ndarray, ...]

    def pieces(self, dropped: int = 0) -> tuple[np.ndarray, ...]:
        """The header, and the events without the oldest `dropped`."""
        return (self.header, *self.events[dropped:])


@dataclass(frozen=True)
class EncodedRequest:
    """A prefix and its candidates.

    Attributes:
        prefix: of all candidates.
        candidates: each candidate with its marker.
        dropped: int64 [candidates], how many of the oldest history events each candidate leaves out.
    """

    prefix: Prefix
    candidates: list[np.ndarray]
    dropped: np.ndarray


def count_dropped(
    prefix: Prefix, candidates: Sequence[np.ndarray], suffix: int, max_length: int, domain: str, first: int = 0
) -> np.ndarray:
    """How many of the oldest history events each candidate leaves out to fit `max_length` tokens, int64 [candidates].

    The number depends on the candidate itself and on no other, so its probabilities do not depend on the rest of the
    request.

    Args:
        prefix: of all candidates.
        candidates: tokens of each candidate with its marker.
        suffix: number of tokens that follow a candidate in training.
        max_length: `stream.max_length` of the domain.
        domain: its name, for messages.
        first: number of the first candidate in messages.

    Raises:
        StreamError: a candidate that does not fit even without history.
    """
    sizes = np.array([0, *map(len, prefix.events)])
    total = np.cumsum(sizes)
    left = len(prefix.header) + total[-1] - total  # [events + 1], prefix tokens without the oldest 0, 1, 2, ... events
    lengths = np.fromiter(map(len, candidates), np.int64, len(candidates)) + suffix
    over = np.flatnonzero(lengths + left[-1] > max_length)
    if len(over):
        raise StreamError(
            f"candidate {first + over[0]} takes {lengths[over[0]]} tokens and the header {left[-1]}, but "
            f"stream.max_length of domain {domain!r} is {max_length}; shorten the item's text"
        )
    # `left` falls: the first place where left + length <= max_length.
    return np.searchsorted(-left, lengths - max_length, "left")
