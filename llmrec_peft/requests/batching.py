"""Batches of requests in which shared prefixes and candidates are computed once.

Candidates of one model that follow the same prefix form a group, whichever requests they come from. A candidate that
stands several times in a group is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np

from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.requests.encoded_request import EncodedRequest

BATCH_TOKENS = 4000
"""Tokens of one forward pass, at most, by default."""


class Calibrated(Protocol):
    """A model whose logits become probabilities."""

    def calibrate(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities float64 [n, labels] of logits [n, labels]."""


Model = TypeVar("Model", bound=Calibrated)


@dataclass(eq=False)
class CandidateGroup(Generic[Model]):
    """One prefix and the different candidates that follow it.

    Attributes:
        model: computes the logits.
        prefix: tokens of the header and of each event with its outcome; a cached prefix may end after any of them.
        candidates: tokens of each candidate with its marker.
        logits: float32 [candidates, labels], once the group is computed.
    """

    model: Model
    prefix: tuple[np.ndarray, ...]
    candidates: list[np.ndarray] = field(default_factory=list)
    logits: np.ndarray = field(init=False)
    _numbers: dict[bytes, int] = field(default_factory=dict, init=False)

    @cached_property
    def prefix_ids(self) -> np.ndarray:
        """Tokens of the whole prefix."""
        return np.concatenate(self.prefix)

    def number(self, candidate: np.ndarray) -> int:
        """The number of a candidate in the group, to which it is added if it is new."""
        number = self._numbers.setdefault(candidate.tobytes(), len(self.candidates))
        if number == len(self.candidates):
            self.candidates.append(candidate)
        return number

    def fitting(self, first: int, room: int) -> int:
        """The end of the candidates from `first` on that fit into `room` tokens; at least one."""
        last = first + 1
        room -= len(self.candidates[first])
        while last < len(self.candidates) and len(self.candidates[last]) <= room:
            room -= len(self.candidates[last])
            last += 1
        return last

    def stream(self, first: int, last: int, begin: int = 0) -> Stream:
        """The prefix from token `begin` on, and the candidates first:last as segments after it."""
        build = StreamBuilder([])
        build.point = begin
        prefix = self.prefix_ids[begin:]
        if len(prefix):
            build.prefix(prefix)
        if last - first == 1:  # a single candidate sees all tokens before it, so it needs no segment and no mask
            ends = [build.prefix(self.candidates[first])]
        else:
            ends = [build.candidate(tokens, tokens[:0]) for tokens in self.candidates[first:last]]
        ids, positions, segment = build.arrays()
        unused = np.zeros(len(ends), np.int64)
        return Stream(ids, positions, segment, np.array(ends, np.int64), unused, unused, np.arange(first, last))


class RequestBatch(Generic[Model]):
    """Encoded requests to be computed together.

    Attributes:
        requested: candidates of all requests.
        distinct: candidates of all groups, which are computed.
    """

    def __init__(self) -> None:
        self.requested = self.distinct = 0
        self._groups: dict[tuple[int, bytes], CandidateGroup[Model]] = {}
        self._places: list[tuple[Model, np.ndarray, list[_Part[Model]]]] = []

    def add(self, request: EncodedRequest, model: Model, out: np.ndarray) -> None:
        """Add a request; `run` writes its probabilities into `out`, float64 [candidates, labels]."""
        parts = []
        for dropped in np.unique(request.dropped):
            prefix = request.prefix.pieces(int(dropped))
            key = (id(model), np.concatenate(prefix).tobytes())
            group = self._groups.setdefault(key, CandidateGroup(model, prefix))
            places, before = np.flatnonzero(request.dropped == dropped), len(group.candidates)
            numbers = np.array([group.number(request.candidates[place]) for place in places])
            parts.append(_Part(group, places, numbers))
            self.distinct += len(group.candidates) - before
        self._places.append((model, out, parts))
        self.requested += len(request.candidates)

    def run(self, predict: Callable[[Sequence[CandidateGroup[Model]]], None]) -> None:
        """Compute all that was added: `predict` sets the logits of each group."""
        predict(list(self._groups.values()))
        for model, out, parts in self._places:
            logits = np.empty(out.shape, np.float32)
            for part in parts:
                logits[part.places] = part.group.logits[part.numbers]
            out[:] = model.calibrate(logits)


@dataclass(frozen=True)
class _Part(Generic[Model]):
    """Candidates `places` [n] of a request are candidates `numbers` [n] of a group."""

    group: CandidateGroup[Model]
    places: np.ndarray
    numbers: np.ndarray
