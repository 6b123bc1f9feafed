"""Synthetic inputs for a student of item ids: streams of items drawn from its vocabulary, with random labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_EVENTS = 40
"""Events on the prefix of a stream, at most."""
CANDIDATES = 4
"""Candidates at the end of each stream."""


class SyntheticIdStreams:
    """A few streams, always the same for a vocabulary and a seed; metrics of their labels mean nothing.

    Attributes:
        lengths: int64 [count], tokens of each stream.
    """

    def __init__(
        self, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, count: int = 8, seed: int = 0
    ) -> None:
        fixed = {*tokenizer.all_special_ids, *(int(token) for word in vocabulary.outcomes for token in word)}
        self._vocabulary, self._rng = vocabulary, np.random.default_rng(seed)
        self._items = np.setdiff1d(np.arange(len(tokenizer)), list(fixed))
        self._streams: list[Stream] = []
        for _ in range(count):
            self._streams.append(self._stream(sum(len(made.markers) for made in self._streams)))
        self.lengths = np.array([len(made) for made in self._streams])

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, number: int) -> Stream:
        return self._streams[number]

    def _stream(self, first: int) -> Stream:
        """One stream whose targets are numbered from `first`."""
        vocabulary, options = self._vocabulary, self._vocabulary.domain.stream
        build = StreamBuilder([vocabulary.prefix])
        markers = []
        # An event and its outcome take two tokens.
        room = (options.max_length - build.length) // 2 - 1
        for _ in range(max(1, min(options.context + options.targets, room, MOST_EVENTS))):
            markers.append(build.prefix(self._item(), vocabulary.marker))
            build.prefix(vocabulary.outcomes[self._rng.integers(len(vocabulary.outcomes))])
        markers += [build.candidate(self._item(), vocabulary.marker) for _ in range(CANDIDATES)]
        ids, positions, segment = build.arrays()
        numbers = np.arange(len(markers)) + first
        labels = np.arange(len(markers)) % len(vocabulary.outcomes)
        return Stream(ids, positions, segment, np.array(markers), labels, numbers, numbers)

    def _item(self) -> np.ndarray:
        return self._rng.choice(self._items, 1).astype(np.int32)
