"""Synthetic inputs: streams of random events in a domain's own templates, to compare two models without a log."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOWS, EVENTS, CANDIDATES = 6, 6, 3
"""Streams, events on the prefix of each, and candidates at its end."""
TOKENS = 384
"""Tokens of a stream, at most, where the domain allows more."""
_SYLLABLES = ("ba", "kel", "no", "ri", "sto", "um", "va", "zin", "tor", "mi", "lue", "par", "sh", "ond", "ex", "qua")


class SyntheticStreams:
    """A few streams with history, several predictions each and candidates, the same for a domain and a tokenizer.

    Predictions are at the markers of the prefix events, each of which sees all before it, and of the candidates. Labels
    are random, so metrics of them are meaningless. `independent` gives each prediction a row of its own, for encoders.

    Attributes:
        lengths: int64 [rows], tokens of each row.
        texts: the whole prompt of each target as text, up to its marker; by target number.
    """

    def __init__(
        self, domain: Domain, tokenizer: PreTrainedTokenizerBase, *, independent: bool = False, seed: int = 0
    ) -> None:
        self._domain, self._vocabulary = domain, Vocabulary(domain, tokenizer)
        self._rng = np.random.default_rng(seed)
        self._streams: list[Stream] = []
        self.texts: list[str] = []
        for _ in range(WINDOWS):
            self._streams.append(self._stream(sum(len(stream.markers) for stream in self._streams)))
        if independent:
            suffix = self._vocabulary.suffix
            self._streams = [
                stream.independent(number, suffix) for stream in self._streams for number in range(len(stream.markers))
            ]
        self.lengths = np.array([len(stream) for stream in self._streams])

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, number: int) -> Stream:
        return self._streams[number]

    def _stream(self, first: int) -> Stream:
        """One stream whose targets are numbered from `first`; the first event is taken however long it is."""
        vocabulary, rng = self._vocabulary, self._rng
        room = min(TOKENS, self._domain.stream.max_length) - len(vocabulary.suffix)
        text, header = self._header()
        build = StreamBuilder([vocabulary.prefix, header])
        markers: list[int] = []
        labels: list[int] = []
        words = list(self._domain.outcomes.values())
        for position in range(EVENTS + CANDIDATES):
            (event_text, event), label = self._event(), int(rng.integers(len(vocabulary.outcomes)))
            longest = len(vocabulary.marker) + max(map(len, vocabulary.outcomes))
            if markers and build.length + len(event) + longest > room:
                break
            prompt = text + event_text + self._domain.marker
            self.texts.append(prompt)
            if position < EVENTS:
                text = prompt + words[label]
                markers.append(build.prefix(event, vocabulary.marker))
                build.prefix(vocabulary.outcomes[label])
            else:
                markers.append(build.candidate(event, vocabulary.marker))
            labels.append(label)
        ids, positions, segment = build.arrays()
        count = len(markers)
        numbers = np.arange(first, first + count)
        return Stream(ids, positions, segment, np.array(markers), np.array(labels), numbers, numbers)

    def _header(self) -> tuple[str, np.ndarray]:
        """A header's text, and its tokens."""
        texts = self._vocabulary.headers(self._columns(self._domain.header), 1).to_pylist()
        return texts[0], self._vocabulary.tokens(texts)[0]

    def _event(self) -> tuple[str, np.ndarray]:
        """An event's text, and its tokens."""
        texts = self._vocabulary.events(self._columns(self._domain.event)).to_pylist()
        return texts[0], self._vocabulary.tokens(texts)[0]

    def _columns(self, template: str) -> dict[str, pa.Array]:
        """A random value for each column that a template names: a text, or a number where its format needs one."""
        fields = {name: spec or "" for _, name, spec, _ in string.Formatter().parse(template) if name is not None}
        return {name: pa.array([self._value(spec)]) for name, spec in fields.items()}

    def _value(self, spec: str) -> str | float | int:
        rng = self._rng
        words = ["".join(rng.choice(_SYLLABLES, rng.integers(1, 4))) for _ in range(rng.integers(1, 4))]
        for value in (" ".join(words), round(float(rng.uniform(1, 200)), 2), int(rng.integers(1, 200))):
            try:
                format(value, spec)
            except ValueError:
                continue
            return value
        return ""  # the template's own check refuses a format that takes none of these
