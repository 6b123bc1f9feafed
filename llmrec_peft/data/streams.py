"""Streams of one split of a log: the data set of its windows, a part of them, and the prompts of single targets."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.event_tokens import take_array, tokenise_events
from llmrec_peft.data.events import select_events
from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.data.log import LogSplit
from llmrec_peft.data.negatives import sample_negatives
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.data.windows import WindowPlanner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

SHORT_LISTS = 0.01  # fraction of positives with too few negatives above which a warning is logged


class Streams(torch.utils.data.Dataset[Stream], ABC):
    """A data set of token rows: the windows of one split of a log, a part of them, or the prompts of their targets.

    Attributes:
        lengths: int64 [len(self)], tokens of each row.
    """

    lengths: np.ndarray

    @property
    @abstractmethod
    def parent(self) -> StreamDataset:
        """The data set of all windows: it has the log, the domain and the arrays of targets."""

    @property
    @abstractmethod
    def windows(self) -> np.ndarray:
        """int64 [n], the windows of `parent` whose targets are here."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, number: int) -> Stream: ...


class StreamDataset(Streams):
    """The windows of one split; the tokens of a window are laid out when it is read.

    W windows, T targets; E events and P target events as in `Events`.

    Attributes:
        events: the events that windows hold.
        lengths, history_sizes: int64 [W], tokens and history events of each window.
        target_offsets: int64 [W + 1]; the targets of window w are target_offsets[w]:target_offsets[w + 1].
        target_rows: int64 [T], row of the log; a sampled negative has the row of its positive.
        target_items: int32 [T], row of the item table.
        target_labels: int64 [T], class number; -1 for none.
        target_sets: int64 [T], candidate set: targets of one moment of a user compete.
        sampled: bool [T], whether the target is a sampled negative.
        dropped_context: history events that max_length left no room for.
    """

    def __init__(
        self,
        split: LogSplit,
        domain: Domain,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        source: np.ndarray | None = None,
        unlabelled: bool = False,
    ) -> None:
        self.name, self.log, self.domain = split.name, split.log, domain
        self.vocabulary = Vocabulary(domain, tokenizer)
        row_classes = domain.classes(self.log)
        self.events = select_events(split, domain, row_classes, unlabelled=unlabelled)
        self._negatives = self._sample(split, seed, row_classes, source)
        self._tokens = tokenise_events(self.log, self.vocabulary, self.events, self._negatives, self.name)
        self._number_targets()
        planner = WindowPlanner(self.log, self.vocabulary, self.events, self._tokens, self._negatives)
        planned = planner.plan()
        self._bounds, self.lengths, self.history_sizes = planned.bounds, planned.lengths, planned.history_sizes
        self.dropped_context = planned.dropped_context
        self.target_offsets = np.append(self._first[self._bounds[:, 2]], self._first[-1])

    # -- targets -------------------------------------------------------------------------------

    def _sample(self, split: LogSplit, seed: int, row_classes: np.ndarray, source: np.ndarray | None) -> np.ndarray:
        """Items of the negatives, int32 [P, per positive]; -1 for none."""
        rule, targets = self.domain.negatives, self.events.targets
        negatives = np.full((len(targets), rule.per_positive), -1, np.int32)
        classes = self.events.classes[targets]  # [P]
        positive = np.flatnonzero((classes >= 0) & (classes != self.domain.negative_class))
        if rule.per_positive and len(positive):
            # Only positive rows make an item known and popular; rows left out of the log, or negative, do not.
            took = (row_classes >= 0) & (row_classes != self.domain.negative_class)
            negatives[positive] = sample_negatives(
                split,
                per_positive=rule.per_positive,
                sampling=rule.sampling,
                seed=seed,
                positives=self.events.rows[targets[positive]],
                source=np.flatnonzero(took) if source is None else source[took[source]],
            )
            self._warn_of_short_lists(negatives[positive])
        return negatives

    def _warn_of_short_lists(self, negatives: np.ndarray) -> None:
        """Log a warning if more positives lack negatives than the first of the log, which have no past."""
        short, none = (negatives < 0).any(1), (negatives < 0).all(1)
        if short.mean() > SHORT_LISTS:
            _log.warning(
                "%s of log %r: %d of %d positives have fewer than %d sampled negatives, and %d have none: too few "
                "items were known before them that their users had not taken; lower negatives.per_positive",
                self.name, self.log.name, short.sum(), len(negatives), negatives.shape[1], none.sum(),
            )  # fmt: skip

    def _number_targets(self) -> None:
        """Number the targets (T): each target event (P) is followed by its negatives, in the log's order."""
        events, taken = self.events, self._negatives >= 0
        counts = 1 + taken.sum(1)  # [P]
        self._first = np.concatenate([[0], np.cumsum(counts)])  # [P + 1], first target of each target event
        self.sampled = np.ones(self._first[-1], bool)
        self.sampled[self._first[:-1]] = False
        self.target_rows = np.repeat(events.rows[events.targets], counts)
        self.target_items = self.log.item_codes[self.target_rows].copy()
        self.target_items[self.sampled] = self._negatives[taken]
        self.target_labels = np.repeat(events.classes[events.targets], counts)
        self.target_labels[self.sampled] = self.domain.negative_class
        _, candidate_sets = np.unique(events.moment[events.targets], return_inverse=True)
        self.target_sets = np.repeat(candidate_sets, counts)

    # -- access --------------------------------------------------------------------------------

    @property
    def parent(self) -> StreamDataset:
        return self

    @property
    def windows(self) -> np.ndarray:
        return np.arange(len(self))

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, number: int) -> Stream:
        begin, edge, start, end = self._bounds[number].tolist()  # events, events, target events, target events
        targets = self.events.targets
        user = int(self.log.user_codes[self.events.rows[targets[start]]])
        build = StreamBuilder([self.vocabulary.prefix, self._tokens.header(user)])
        for event in range(begin, edge):
            self._join(build, event)
        markers: dict[int, int] = {}  # target -> index of its marker's last token
        event, last = int(targets[start]), int(targets[end - 1])
        while event <= last:
            stop = event + 1
            while stop <= last and self.events.moment[stop] == self.events.moment[event]:
                stop += 1
            self._moment(build, range(event, stop), markers, is_last=stop > last)
            event = stop
        numbers = np.arange(self.target_offsets[number], self.target_offsets[number + 1])  # targets
        order = np.array([markers[target] for target in numbers])
        ids, positions, segment = build.arrays()
        return Stream(ids, positions, segment, order, self.target_labels[numbers], self.target_sets[numbers], numbers)

    def _join(self, build: StreamBuilder, event: int) -> None:
        """Lay a finished event on the prefix, if its label lets later events see it."""
        if self.events.in_history[event]:
            outcome = self.vocabulary.outcomes[self.events.classes[event]]
            build.prefix(self._tokens.event(event), self.vocabulary.marker, outcome)

    def _moment(self, build: StreamBuilder, moment: range, markers: dict[int, int], is_last: bool) -> None:
        """Lay down the events of one moment: first its targets, then what later moments see."""
        marker = self.vocabulary.marker
        on_prefix = bool(self.events.on_prefix[moment[0]])
        for event in moment:
            if not self.events.is_target[event]:
                continue
            index = int(np.searchsorted(self.events.targets, event))  # target event
            target = first = int(self._first[index])
            if not on_prefix:
                markers[first] = build.candidate(self._tokens.event(event), marker)
            for text in self._tokens.negative_text[index]:
                if text >= 0:
                    target += 1
                    markers[target] = build.candidate(self._tokens.table[text], marker)
            if on_prefix:
                # After its negatives, which must not see it.
                markers[first] = build.prefix(self._tokens.event(event), marker)
                if not is_last:
                    build.prefix(self.vocabulary.outcomes[self.events.classes[event]])
                return
        if not is_last:
            for event in moment:
                self._join(build, event)

    def token_arrays(self) -> list[np.ndarray]:
        """Arrays that decide the tokens of headers and events, and where they stand: for fingerprints."""
        tokens = self._tokens
        return [self.events.classes, tokens.event_text, tokens.negative_text, tokens.table.offsets, tokens.table.tokens,
                tokens.headers.offsets, tokens.headers.tokens]  # fmt: skip

    def contents(self) -> list[np.ndarray]:
        """Arrays that decide every stream: for fingerprints."""
        vocabulary, events = self.vocabulary, self.events
        return [
            self.lengths, self.target_offsets, self.target_rows, self.target_items, self.target_labels,
            self.target_sets, self._bounds, events.rows, events.in_history, events.moment, *self.token_arrays(),
            vocabulary.prefix, vocabulary.suffix, vocabulary.marker, *vocabulary.outcomes,
        ]  # fmt: skip

    @property
    def num_targets(self) -> int:
        """Targets of all windows, sampled negatives included."""
        return int(self.target_offsets[-1])

    @property
    def has_candidates(self) -> bool:
        """Whether any target is a candidate, off the prefix, that the others must not see."""
        return bool((self._negatives >= 0).any() or not self.events.on_prefix[self.events.targets].all())

    def limited(self, targets: int | None, seed: int = 0) -> StreamSubset | StreamDataset:
        """Whole windows drawn at random until they hold at least `targets` targets; all windows for None."""
        if targets is None or targets >= self.num_targets:
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        enough = int(np.searchsorted(np.cumsum(np.diff(self.target_offsets)[order]), targets)) + 1
        return StreamSubset(self, np.sort(order[:enough]))

    def describe(self, targets: np.ndarray) -> pa.Table:
        """Columns split, user_id, item_id, timestamp, label (name, or null) of target numbers [n]."""
        rows, items = self.target_rows[targets], self.target_items[targets]
        classes = self.target_labels[targets]
        labels = pa.array(self.domain.labels).take(pa.array(classes, mask=classes < 0))
        return pa.table(
            {
                "split": pa.array([self.name] * len(rows)),
                "user_id": take_array(self.log.interactions.column("user_id"), rows).cast(pa.string()),
                "item_id": take_array(self.log.items.column("item_id"), items).cast(pa.string()),
                "timestamp": take_array(self.log.interactions.column("timestamp"), rows),
                "label": labels,
            }
        )


class StreamSubset(Streams):
    """Some windows of a stream data set."""

    def __init__(self, parent: StreamDataset, windows: np.ndarray) -> None:
        self._parent, self._windows = parent, windows
        self.lengths = parent.lengths[windows]

    @property
    def parent(self) -> StreamDataset:
        return self._parent

    @property
    def windows(self) -> np.ndarray:
        return self._windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, number: int) -> Stream:
        return self._parent[int(self._windows[number])]


class IndependentPrompts(Streams):
    """Each target of a stream data set as a prompt of its own, which a stream's predictions must equal.

    Attributes:
        streams: whose targets these are.
    """

    def __init__(self, streams: StreamDataset | StreamSubset) -> None:
        self.streams = streams
        suffix = len(self.parent.vocabulary.suffix)
        counts = np.diff(self.parent.target_offsets)[streams.windows]  # targets of each window
        starts = np.cumsum(counts) - counts
        self._window = np.repeat(np.arange(len(streams)), counts)  # row of `streams`, of each prompt
        self._number = np.arange(len(self._window)) - np.repeat(starts, counts)  # place in its window, of each prompt
        self.lengths = np.repeat(streams.lengths, counts) + suffix
        # A window's only target sees all of it. Where there are more, what each one sees is known only by building it.
        for window in np.flatnonzero(counts > 1):
            stream = streams[int(window)]
            ends = stream.position_ids[stream.markers] + 1 + suffix
            self.lengths[starts[window] : starts[window] + counts[window]] = ends

    @property
    def parent(self) -> StreamDataset:
        return self.streams.parent

    @property
    def windows(self) -> np.ndarray:
        return self.streams.windows

    def __len__(self) -> int:
        return len(self._window)

    def __getitem__(self, number: int) -> Stream:
        stream = self.streams[int(self._window[number])]
        return stream.independent(int(self._number[number]), self.parent.vocabulary.suffix)


def independent_prompts(streams: Streams) -> IndependentPrompts:
    """The targets of `streams` as prompts of their own; `streams` itself where they are that already."""
    if isinstance(streams, StreamDataset | StreamSubset):
        return IndependentPrompts(streams)
    assert isinstance(streams, IndependentPrompts)
    return streams


def build_streams(
    split: LogSplit,
    domain: Domain,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    source: np.ndarray | None = None,
    unlabelled: bool = False,
) -> StreamDataset:
    """Cut one split of a log into token streams.

    Args:
        split: targets, from :meth:`BehaviorLog.split`; all earlier rows of a user are history.
        domain: templates and rules.
        tokenizer: the base model's.
        seed: random seed of the sampled negatives.
        source: rows of the log that negatives are drawn from; for splits by user, the training rows.
        unlabelled: make rows of the split that the domain leaves out targets too, with class -1: candidates that no
            later event sees. A teacher can predict them; a loss on labels cannot use them.

    Raises:
        StreamError: an event that does not fit a window, or a marker or an outcome without tokens.
        DomainError: a template names a column that is not there.
        DataError: no labelled target, or labels outside the domain's list.
    """
    return StreamDataset(split, domain, tokenizer, seed=seed, source=source, unlabelled=unlabelled)
