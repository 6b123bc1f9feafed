"""From a log to token streams: windows, prefix, candidates, and the independent prompts that they must equal."""

import logging

import numpy as np
import pyarrow as pa
import torch

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.data.negatives import sample_negatives
from llmrec_peft.data.splits import LogSplit, context_only
from llmrec_peft.data.tokens import CHUNK, TokenTable, Vocabulary
from llmrec_peft.errors import DataError, DomainError, StreamError

_log = logging.getLogger(__name__)

SHORT_LISTS = 0.01  # share of positives with too few negatives from which a warning says so


class StreamDataset(torch.utils.data.Dataset):
    """The windows of one split, made into tokens when they are asked for.

    Attributes:
        lengths, history_sizes: int64 [windows], tokens and history events of each.
        target_offsets: int64 [windows + 1]; window w answers targets target_offsets[w]:target_offsets[w + 1].
        target_rows, target_items, target_labels, target_lists: arrays [targets] (row of the log, row of its item
            table, class number or -1 for none, list number); sampled negatives have the row of their positive.
        sampled: bool [targets], whether the target is a sampled negative.
        dropped_context: history events that max_length left no room for.
    """

    def __init__(
        self,
        split: LogSplit,
        domain: Domain,
        tokenizer,
        *,
        seed: int = 0,
        source: np.ndarray | None = None,
        unlabelled: bool = False,
    ):
        self.name, self.log, self.domain = split.name, split.log, domain
        self.vocabulary = Vocabulary(domain, tokenizer)
        classes = domain.classes(self.log)
        asked = classes >= 0
        if unlabelled:
            asked[split.rows] = True
        asked[self._duplicates(split)] = False
        self._kept = self._needed(split, asked)
        self._classes = classes[self._kept].astype(np.int64)
        is_target = np.zeros(len(self.log), bool)
        is_target[split.rows] = True
        self._is_target = is_target[self._kept]
        self._target_positions = np.flatnonzero(self._is_target)
        if not len(self._target_positions):
            raise DataError(f"split '{split.name}' of {self.log.name} has no labelled target; give more data or shares")
        joining = domain.stream.history_labels
        joins = np.array([joining is None or label in joining for label in domain.labels])
        self._joins = joins[self._classes] & (self._classes >= 0)
        self._group = self._groups()
        # An event alone at its moment is predicted on the prefix; events that share one are predicted as candidates.
        self._on_prefix = self._joins & (np.bincount(self._group, minlength=len(self._kept))[self._group] == 1)
        self._negatives = self._sample(split, seed, classes, source)
        self._read_texts()
        self._number_targets()
        self._plan()

    def _duplicates(self, split: LogSplit) -> np.ndarray:
        """Rows of the log that the domain's `duplicates` leaves out; logs how many there are."""
        domain, found = self.domain, self.log.duplicates
        if not len(found.rows):
            return found.rows
        classes = domain.row_labels(self.log)
        surplus = found.surplus(classes, context_only(self.log))
        own = int(np.isin(surplus, split.rows, assume_unique=True).sum())
        drops = domain.duplicates == "drop"
        if own and (drops or domain.simultaneous == "order"):
            _log.warning(
                "%s of log %r: %d rows (%d in the whole log) repeat the user, item and moment of another row, %d such "
                "events of the log with different labels; %s",
                split.name, self.log.name, own, len(surplus), found.conflicts(classes),
                "one row of each stays, the last with a label (duplicates: drop)" if drops else
                "they see its outcome in the history; set duplicates: drop in the domain",
            )  # fmt: skip
        return surplus if drops else surplus[:0]

    def _needed(self, split: LogSplit, asked: np.ndarray) -> np.ndarray:
        """Rows of `asked` that a window can hold: up to the moment of each user's last target, int64 [kept]."""
        last = np.full(self.log.num_users, -np.inf)
        np.maximum.at(last, self.log.user_codes[split.rows], self.log.timestamps[split.rows])
        return np.flatnonzero(asked & (self.log.timestamps <= last[self.log.user_codes]))

    def _groups(self) -> np.ndarray:
        """First kept position of each position's moment; with `order` each event is a moment of its own."""
        count = len(self._kept)
        if self.domain.simultaneous == "order":
            return np.arange(count)
        users, times = self.log.user_codes[self._kept], self.log.timestamps[self._kept]
        new = np.ones(count, bool)
        new[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
        return np.maximum.accumulate(np.where(new, np.arange(count), 0))

    def _sample(self, split: LogSplit, seed: int, classes: np.ndarray, source: np.ndarray | None) -> np.ndarray:
        """Item rows of the negatives, int32 [split's targets, per positive], -1 for none."""
        rule, positions = self.domain.negatives, self._target_positions
        negatives = np.full((len(positions), rule.per_positive), -1, np.int32)
        classes_of = self._classes[positions]
        positive = np.flatnonzero((classes_of >= 0) & (classes_of != self.domain.negative_class))
        if rule.per_positive and len(positive):
            # What was taken makes an item known and popular; rows left out of the log, or refused, do not.
            took = (classes >= 0) & (classes != self.domain.negative_class)
            negatives[positive] = sample_negatives(
                split,
                per_positive=rule.per_positive,
                sampling=rule.sampling,
                seed=seed,
                positives=self._kept[positions[positive]],
                source=np.flatnonzero(took) if source is None else source[took[source]],
            )
            self._warn_of_short_lists(negatives[positive])
        return negatives

    def _warn_of_short_lists(self, negatives: np.ndarray) -> None:
        """Say so where more than the first positives of the log, which have no past, lack negatives."""
        short, none = (negatives < 0).any(1), (negatives < 0).all(1)
        if short.mean() > SHORT_LISTS:
            _log.warning(
                "%s of log %r: %d of %d positives have fewer than %d sampled negatives, and %d have none: too few "
                "items were known before them that their users had not taken; lower negatives.per_positive",
                self.name, self.log.name, short.sum(), len(short), negatives.shape[1], none.sum(),
            )  # fmt: skip

    # -- texts ---------------------------------------------------------------------------------

    def _column(self, name: str, rows: np.ndarray, items: np.ndarray) -> pa.Array:
        """A template's column for pairs of interaction and item; the item table's comes first."""
        if name in self.log.items.column_names:
            return _take(self.log.items.column(name), items)
        if name in self.log.interactions.column_names:
            return _take(self.log.interactions.column(name), rows)
        raise DomainError(
            f"domain '{self.domain.name}': event names the column '{name}', which neither the items "
            f"({', '.join(self.log.items.column_names)}) nor the interactions "
            f"({', '.join(self.log.interactions.column_names)}) have; correct the template"
        )

    def _read_texts(self) -> None:
        """Tokenise headers and events; `_text` and `_negative_text` number the events' texts."""
        vocabulary, columns = self.vocabulary, self.domain.event_columns
        taken = self._negatives >= 0
        rows = np.concatenate([self._kept, np.repeat(self._kept[self._target_positions], taken.sum(1))])
        items = np.concatenate([self.log.item_codes[self._kept], self._negatives[taken]])
        if set(columns) <= set(self.log.items.column_names):
            # The text depends on the item alone, so each item is tokenised once.
            items, numbers = np.unique(items, return_inverse=True)
            rows = np.zeros(len(items), np.int64)
        else:
            numbers = np.arange(len(rows))
        slices = [slice(start, start + CHUNK) for start in range(0, len(items), CHUNK)]
        chunks = (vocabulary.events({name: self._column(name, rows[s], items[s]) for name in columns}) for s in slices)
        self._events = TokenTable.build(vocabulary, chunks, len(items), f"{self.name} events")
        self._text = numbers[: len(self._kept)]
        self._negative_text = np.full(self._negatives.shape, -1, np.int64)
        self._negative_text[taken] = numbers[len(self._kept) :]
        self._headers = self._read_headers()

    def _read_headers(self) -> TokenTable:
        """One header for all, or one a user from the columns of the user's first interaction."""
        columns, first = self.domain.header_columns, self.log.user_offsets[:-1]
        known = self.log.interactions.column_names
        for name in columns:
            if name not in known:
                raise DomainError(
                    f"domain '{self.domain.name}': header names the column '{name}', which the interactions "
                    f"({', '.join(known)}) do not have; correct the template"
                )
        count = len(first) if columns else 1
        slices = [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        chunks = (
            self.vocabulary.headers(
                {name: _take(self.log.interactions.column(name), first[s]) for name in columns}, s.stop - s.start
            )
            for s in slices
        )
        return TokenTable.build(self.vocabulary, chunks, count, f"{self.name} headers")

    def _header(self, user: int) -> int:
        return user if len(self._headers) > 1 else 0

    # -- targets and windows -------------------------------------------------------------------

    def _number_targets(self) -> None:
        """Each positive is followed by its negatives, in the log's order."""
        positions, taken = self._target_positions, self._negatives >= 0
        counts = 1 + taken.sum(1)
        self._first = np.concatenate([[0], np.cumsum(counts)])  # first target number of each target position
        self.sampled = np.ones(self._first[-1], bool)
        self.sampled[self._first[:-1]] = False
        self.target_rows = np.repeat(self._kept[positions], counts)
        self.target_items = self.log.item_codes[self.target_rows].copy()
        self.target_items[self.sampled] = self._negatives[taken]
        self.target_labels = np.repeat(self._classes[positions], counts)
        self.target_labels[self.sampled] = self.domain.negative_class
        _, lists = np.unique(self._group[positions], return_inverse=True)
        self.target_lists = np.repeat(lists, counts)

    def _costs(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that each kept position takes as history, and to be answered with its negatives; int64 [kept]."""
        sizes, marker = self._events.lengths, len(self.vocabulary.marker)
        event = sizes[self._text] + marker
        history = np.where(self._joins, event + self._word_lengths(), 0)
        answer = np.where(self._is_target, event, 0)
        if self._negatives.size:
            taken = self._negative_text >= 0
            answer[self._target_positions] += np.where(taken, sizes[self._negative_text] + marker, 0).sum(1)
        return history, answer

    def _word_lengths(self) -> np.ndarray:
        """Tokens of each kept position's outcome."""
        return np.array([len(ids) for ids in self.vocabulary.outcomes])[self._classes]

    def _plan(self) -> None:
        """Cut each user's targets into windows, and give each the newest history that fits."""
        rule, positions = self.domain.stream, self._target_positions
        history, answer = self._costs()
        # Sums up to each position: tokens of history, events of history.
        past, events = _sums(history), _sums(self._joins)
        begins, ends = self._spans(history, answer)
        users = self.log.user_codes[self._kept]
        user_of = users[positions]
        cuts = np.flatnonzero(np.diff(user_of)) + 1
        bounds = np.concatenate([[0], cuts, [len(positions)]])
        windows, self.dropped_context = [], 0
        around = len(self.vocabulary.prefix) + len(self.vocabulary.suffix)
        first_of_user = np.searchsorted(users, user_of[bounds[:-1]])
        runs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), first_of_user.tolist(), strict=True)
        for start, stop, oldest in runs:
            room = rule.max_length - around - int(self._headers.lengths[self._header(int(user_of[start]))])
            while start < stop:
                most = min(start + rule.targets, stop)
                end = start + int(np.searchsorted(ends[start:most], begins[start] + room, "right"))
                if end == start:
                    self._refuse(start, room)
                end = self._whole_moments(start, end, stop)
                edge = self._group[positions[start]]
                left = room - (ends[end - 1] - begins[start])
                wanted = max(oldest, int(np.searchsorted(events, events[edge] - rule.context, "left")))
                begin = max(wanted, int(np.searchsorted(past, past[edge] - left, "left")))
                self.dropped_context += int(events[min(begin, edge)] - events[min(wanted, edge)])
                windows.append((min(begin, edge), edge, start, end))
                start = end
        self._windows = np.array(windows, np.int64)
        self.target_offsets = np.append(self._first[self._windows[:, 2]], self._first[-1])
        begin, edge, start, end = self._windows.T
        header = self._headers.lengths[user_of[start] if len(self._headers) > 1 else np.zeros_like(start)]
        self.lengths = len(self.vocabulary.prefix) + header + past[edge] - past[begin] + ends[end - 1] - begins[start]
        self.history_sizes = events[edge] - events[begin]

    def _spans(self, history: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each target begins and ends if all is laid down in order; int64 [target positions] each.

        A window from target i to target j takes ends[j] - begins[i] tokens besides its header and its history: what
        would follow the last answer is not laid down.
        """
        positions, first = self._target_positions, self._group[self._target_positions]
        # An event predicted on the prefix only adds its outcome there; one that was a candidate is laid down again.
        joining = np.where(self._on_prefix & self._is_target, self._word_lengths(), history)
        until, answers = _sums(answer + joining), _sums(answer)
        ends = until[first] + answers[positions + 1] - answers[first]
        return ends - answer[positions], ends

    def _whole_moments(self, start: int, end: int, stop: int) -> int:
        """Do not cut a moment in two unless it alone is over the limits.

        A window that begins inside a moment ends with it: later events must see all of that moment or none of it.
        """
        group = self._group[self._target_positions[start : end + 1]]
        if self._target_positions[start] != group[0]:
            return min(end, start + int(np.searchsorted(group, group[0], "right")))
        if end < stop and group[end - start] == group[end - start - 1] != group[0]:
            return start + int(np.searchsorted(group, group[end - start], "left"))
        return end

    def _refuse(self, index: int, room: int) -> None:
        """Name what does not fit: the header, or the longest of an event and its negatives."""
        position, limit = self._target_positions[index], self.domain.stream.max_length
        row = self._kept[position]
        if room <= 0:
            user = self.log.user_ids[int(self.log.user_codes[row])].as_py()
            raise StreamError(
                f"header of user '{user}' takes all but {room} of the {limit} tokens of stream.max_length; "
                "shorten the header or raise max_length"
            )
        taken = self._negatives[index] >= 0
        texts = [int(self._text[position]), *self._negative_text[index][taken].tolist()]
        items = [int(self.log.item_codes[row]), *self._negatives[index][taken].tolist()]
        sizes = self._events.lengths[texts]
        item = self.log.items.column("item_id")[items[int(sizes.argmax())]].as_py()
        beside = " and its sampled negatives" if len(texts) > 1 else ""
        raise StreamError(
            f"item '{item}' takes {sizes.max()} tokens: the event of row {row} of {self.log.name}{beside} needs "
            f"{sizes.sum() + len(texts) * len(self.vocabulary.marker)} with markers, and stream.max_length {limit} "
            f"leaves {room}; shorten the item's text or raise max_length"
        )

    # -- access --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, number: int) -> Stream:
        begin, edge, start, end = self._windows[number]
        positions, vocabulary = self._target_positions, self.vocabulary
        user = int(self.log.user_codes[self._kept[positions[start]]])
        build = StreamBuilder([vocabulary.prefix, self._headers[self._header(user)]])
        for position in range(begin, edge):
            self._join(build, position)
        markers: dict[int, int] = {}
        position, last = int(positions[start]), int(positions[end - 1])
        while position <= last:
            stop = position + 1
            while stop <= last and self._group[stop] == self._group[position]:
                stop += 1
            self._moment(build, range(position, stop), markers, is_last=stop > last)
            position = stop
        targets = np.arange(self.target_offsets[number], self.target_offsets[number + 1])
        order = np.array([markers[target] for target in targets])
        ids, places, segment = build.arrays()
        return Stream(ids, places, segment, order, self.target_labels[targets], self.target_lists[targets], targets)

    def _join(self, build: StreamBuilder, position: int) -> None:
        """Lay a finished event on the prefix, if its label lets later events see it."""
        if self._joins[position]:
            word = self.vocabulary.outcomes[self._classes[position]]
            build.prefix(self._events[self._text[position]], self.vocabulary.marker, word)

    def _moment(self, build: StreamBuilder, members: range, markers: dict[int, int], is_last: bool) -> None:
        """Lay down the events of one moment: answers first, then what later moments see."""
        marker = self.vocabulary.marker
        on_prefix = bool(self._on_prefix[members[0]])
        for position in members:
            if not self._is_target[position]:
                continue
            index = int(np.searchsorted(self._target_positions, position))
            target = int(self._first[index])
            if not on_prefix:
                markers[target] = build.candidate(self._events[self._text[position]], marker)
            for text in self._negative_text[index]:
                if text >= 0:
                    target += 1
                    markers[target] = build.candidate(self._events[text], marker)
            if on_prefix:
                markers[int(self._first[index])] = build.prefix(self._events[self._text[position]], marker)
                if not is_last:
                    build.prefix(self.vocabulary.outcomes[self._classes[position]])
                return
        if not is_last:
            for position in members:
                self._join(build, position)

    def texts(self) -> list[np.ndarray]:
        """Arrays that decide the tokens of headers and events, and the places they stand at: for fingerprints."""
        return [self._classes, self._text, self._negative_text, self._events.offsets, self._events.tokens,
                self._headers.offsets, self._headers.tokens]  # fmt: skip

    def contents(self) -> list[np.ndarray]:
        """Arrays that decide every stream: for fingerprints."""
        vocabulary = self.vocabulary
        return [
            self.lengths, self.target_offsets, self.target_rows, self.target_items, self.target_labels,
            self.target_lists, self._windows, self._kept, self._joins, self._group, *self.texts(),
            vocabulary.prefix, vocabulary.suffix, vocabulary.marker, *vocabulary.outcomes,
        ]  # fmt: skip

    @property
    def num_targets(self) -> int:
        """Targets of all windows, sampled negatives included."""
        return int(self.target_offsets[-1])

    @property
    def has_candidates(self) -> bool:
        """Whether any target is answered off the prefix, as a candidate that the others must not see."""
        return bool((self._negatives >= 0).any() or not self._on_prefix[self._target_positions].all())

    def limited(self, targets: int | None, seed: int = 0) -> "StreamSubset | StreamDataset":
        """Whole windows drawn at random until they hold at least so many targets; all for None."""
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
                "user_id": _take(self.log.interactions.column("user_id"), rows).cast(pa.string()),
                "item_id": _take(self.log.items.column("item_id"), items).cast(pa.string()),
                "timestamp": _take(self.log.interactions.column("timestamp"), rows),
                "label": labels,
            }
        )


class StreamSubset(torch.utils.data.Dataset):
    """Some windows of a stream data set; `parent` names the rest."""

    def __init__(self, parent: StreamDataset, windows: np.ndarray):
        self.parent, self.windows = parent, windows
        self.lengths = parent.lengths[windows]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> Stream:
        return self.parent[int(self.windows[number])]


class IndependentPrompts(torch.utils.data.Dataset):
    """Each target of a stream data set as a prompt of its own: the measure of the stream's answers."""

    def __init__(self, streams: StreamDataset | StreamSubset):
        self.streams = streams
        self.parent: StreamDataset = getattr(streams, "parent", streams)
        windows = getattr(streams, "windows", np.arange(len(streams)))
        counts = np.diff(self.parent.target_offsets)[windows]
        self._window = np.repeat(np.arange(len(streams)), counts)
        self._number = np.arange(len(self._window)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.lengths = np.repeat(streams.lengths, counts) + len(self.parent.vocabulary.suffix)
        # A window's only target sees all of it; where there are more, only building it tells what each one sees.
        starts = np.cumsum(counts) - counts
        for window in np.flatnonzero(counts > 1):
            stream = streams[int(window)]
            ends = stream.position_ids[stream.markers] + 1 + len(self.parent.vocabulary.suffix)
            self.lengths[starts[window] : starts[window] + counts[window]] = ends

    def __len__(self) -> int:
        return len(self._window)

    def __getitem__(self, number: int) -> Stream:
        stream = self.streams[int(self._window[number])]
        return stream.independent(int(self._number[number]), self.parent.vocabulary.suffix)


def build_streams(
    split: LogSplit,
    domain: Domain,
    tokenizer,
    *,
    seed: int = 0,
    source: np.ndarray | None = None,
    unlabelled: bool = False,
) -> StreamDataset:
    """Cut one split of a log into token streams.

    Args:
        split: targets, from :meth:`BehaviorLog.split`; all earlier rows of a user are history.
        domain: words and rules.
        tokenizer: the base model's.
        seed: of the sampled negatives, fixed for good by it.
        source: rows whose items and counts negatives are drawn from, for splits by user the training rows.
        unlabelled: rows of the split that the domain leaves out are targets too, with class -1: candidates that no
            later event sees. A teacher can answer them; a loss to labels cannot.

    Raises:
        StreamError: an event that does not fit a window, or a marker or an outcome without tokens.
        DomainError: a template names a column that is not there.
        DataError: no labelled target, or labels outside the domain's list.
    """
    return StreamDataset(split, domain, tokenizer, seed=seed, source=source, unlabelled=unlabelled)


def _sums(values: np.ndarray) -> np.ndarray:
    """Sum of all values before each place; int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])


def _take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.Array:
    taken = column.take(pa.array(rows))
    return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken
