"""One window as tokens: the prefix, and the candidates attached to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

PREFIX = 0  # segment of the header and of the events that later ones see


@dataclass(frozen=True)
class Stream:
    """One window as tokens; L tokens, T targets.

    Attributes:
        input_ids: int32 [L].
        position_ids: int32 [L]; a candidate's positions continue from the prefix token that it is attached to.
        segment: int32 [L]; 0 for the prefix, a new number for each candidate.
        markers: int64 [T]; index of the token at which each target is predicted.
        labels: int64 [T]; class numbers.
        candidate_sets: int64 [T]; targets with equal numbers compete at one moment.
        targets: int64 [T]; row numbers of `StreamDataset.targets`.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment: np.ndarray
    markers: np.ndarray
    labels: np.ndarray
    candidate_sets: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def independent(self, number: int, suffix: np.ndarray) -> Stream:
        """The prompt of one target alone: only the tokens that it sees of this stream."""
        end, segment = self.markers[number], self.segment[self.markers[number]]
        seen = np.flatnonzero((self.segment[: end + 1] == PREFIX) | (self.segment[: end + 1] == segment))
        one = slice(number, number + 1)
        ids = np.concatenate([self.input_ids[seen], suffix])
        return Stream(ids, np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32),
                      np.array([len(seen) - 1]), self.labels[one], self.candidate_sets[one],
                      self.targets[one])  # fmt: skip


class StreamRows(Protocol):
    """Rows of tokens to predict on: streams of a log (`data.streams.Streams`) or synthetic ones."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows], tokens of each row."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Stream: ...


class StreamBuilder:
    """Lays down the tokens of one stream in order."""

    def __init__(self, prefix: list[np.ndarray]) -> None:
        self.pieces: list[np.ndarray] = []
        self.segments: list[int] = []
        self.starts: list[int] = []
        self.length = 0  # tokens laid down
        self.point = 0  # prefix tokens laid down, the next prefix position
        self.candidates = 0
        for ids in prefix:
            self.prefix(ids)

    def prefix(self, *parts: np.ndarray) -> int:
        """Append parts to the prefix; returns the index of the last token."""
        for ids in parts:
            self.pieces.append(ids)
            self.segments.append(PREFIX)
            self.starts.append(self.point)
            self.point += len(ids)
            self.length += len(ids)
        return self.length - 1

    def candidate(self, event: np.ndarray, marker: np.ndarray) -> int:
        """Attach an event with its marker to the present end of the prefix; returns the index of the last token."""
        self.candidates += 1
        position = self.point
        for ids in (event, marker):
            self.pieces.append(ids)
            self.segments.append(self.candidates)
            self.starts.append(position)
            position += len(ids)
            self.length += len(ids)
        return self.length - 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, position ids and segments of what was laid down, each int32 [L]."""
        sizes = np.array([len(ids) for ids in self.pieces])
        ends = np.cumsum(sizes)
        positions = np.arange(self.length) + np.repeat(np.array(self.starts) - (ends - sizes), sizes)
        segment = np.repeat(np.array(self.segments, np.int32), sizes)
        return np.concatenate(self.pieces).astype(np.int32), positions.astype(np.int32), segment


def window_start(events: int, window: int, stride: int) -> int:
    """Index of the first of `events` history events that is used, at most `window` of them.

    The start advances in steps of `stride`, so that a growing history keeps its beginning (and its prefix cache)
    for `stride` events. Of a long history, between `window - stride + 1` and `window` events are used.
    """
    over = max(0, events - window)
    return -(-over // stride) * stride
