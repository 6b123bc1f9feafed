"""Cut each user's targets into windows, and give each window the newest history that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmrec_peft.data.event_tokens import EventTokens
from llmrec_peft.data.events import Events
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import StreamError


@dataclass(frozen=True)
class Windows:
    """The windows of one split, W of them; E, P: see `Events`.

    Attributes:
        bounds: int64 [W, 4], of each window: its first history event (E), the first event (E) of the moment of its
            first target, where history ends; its first target event (P), and the one after its last (P).
        lengths: int64 [W], tokens.
        history_sizes: int64 [W], history events.
        dropped_context: history events that `max_length` left no room for, in all windows.
    """

    bounds: np.ndarray
    lengths: np.ndarray
    history_sizes: np.ndarray
    dropped_context: int


class WindowPlanner:
    """Plans the windows of one split by the token counts of its events.

    Targets of a window are laid down in order, so the tokens from target event i to target event j are a difference of
    cumulative sums, and each window is found by binary search.
    """

    def __init__(
        self, log: BehaviorLog, vocabulary: Vocabulary, events: Events, tokens: EventTokens, negatives: np.ndarray
    ) -> None:
        self.log, self.vocabulary, self.events, self.tokens, self.negatives = log, vocabulary, events, tokens, negatives
        self.rule = vocabulary.domain.stream

    def plan(self) -> Windows:
        """Cut all users' targets into windows.

        Raises:
            StreamError: a header or an event that does not fit into `max_length` tokens.
        """
        history, predicted = self._token_counts()
        # [E + 1]: history tokens and history events before each event.
        past, earlier = prefix_sums(history), prefix_sums(self.events.in_history)
        begins, ends = self._spans(history, predicted)
        bounds: list[tuple[int, int, int, int]] = []
        dropped = 0
        around = len(self.vocabulary.prefix) + len(self.vocabulary.suffix)
        for user, oldest, start, stop in self._users():
            header = int(self.tokens.headers.lengths[self.tokens.header_number(user)])
            room = self.rule.max_length - around - header
            while start < stop:
                most = min(start + self.rule.targets, stop)
                end = start + int(np.searchsorted(ends[start:most], begins[start] + room, "right"))
                if end == start:
                    self._refuse(start, room)
                end = self._whole_moments(start, end, stop)
                edge = int(self.events.moment[self.events.targets[start]])
                left = room - (ends[end - 1] - begins[start])
                # The last `context` history events, and of these the ones that fit into the remaining tokens.
                wanted = max(oldest, int(np.searchsorted(earlier, earlier[edge] - self.rule.context, "left")))
                begin = max(wanted, int(np.searchsorted(past, past[edge] - left, "left")))
                dropped += int(earlier[min(begin, edge)] - earlier[min(wanted, edge)])
                bounds.append((min(begin, edge), edge, start, end))
                start = end
        planned = np.array(bounds, np.int64)
        begin_, edge_, start_, end_ = planned.T
        users = self.log.user_codes[self.events.rows[self.events.targets[start_]]]
        headers = self.tokens.headers.lengths[users if len(self.tokens.headers) > 1 else np.zeros_like(start_)]
        lengths = len(self.vocabulary.prefix) + headers + past[edge_] - past[begin_] + ends[end_ - 1] - begins[start_]
        return Windows(planned, lengths, earlier[edge_] - earlier[begin_], dropped)

    def _users(self) -> Iterator[tuple[int, int, int, int]]:
        """Of each user with targets: code, first event (E), first target event (P) and the one after the last (P)."""
        users = self.log.user_codes[self.events.rows]  # [E]
        user_of = users[self.events.targets]  # [P]
        cuts = np.flatnonzero(np.diff(user_of)) + 1
        starts, stops = np.append(0, cuts), np.append(cuts, len(user_of))
        codes = user_of[starts]
        oldest = np.searchsorted(users, codes)
        return zip(codes.tolist(), oldest.tolist(), starts.tolist(), stops.tolist(), strict=True)

    def _token_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each event as history, and as a target with its negatives; int64 [E] each."""
        sizes, marker = self.tokens.table.lengths, len(self.vocabulary.marker)
        event = sizes[self.tokens.event_text] + marker
        history = np.where(self.events.in_history, event + self._outcome_lengths(), 0)
        predicted = np.where(self.events.is_target, event, 0)
        if self.negatives.size:
            text = self.tokens.negative_text
            predicted[self.events.targets] += np.where(text >= 0, sizes[text] + marker, 0).sum(1)
        return history, predicted

    def _outcome_lengths(self) -> np.ndarray:
        """Tokens of each event's outcome, int64 [E]."""
        return np.array([len(ids) for ids in self.vocabulary.outcomes])[self.events.classes]

    def _spans(self, history: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each target event begins and ends if all targets are laid down in order; int64 [P] each.

        A window from target event i to target event j takes ends[j] - begins[i] tokens besides its header and history.
        What would follow the last marker is not laid down.
        """
        targets = self.events.targets
        first = self.events.moment[targets]
        # An event predicted on the prefix only adds its outcome there; one that was a candidate is laid down again.
        alone = self.events.on_prefix & self.events.is_target
        joining = np.where(alone, self._outcome_lengths(), history)
        # Before the moment: all events with their outcomes. Within the moment: only what is predicted.
        until, within = prefix_sums(predicted + joining), prefix_sums(predicted)
        ends = until[first] + within[targets + 1] - within[first]
        return ends - predicted[targets], ends

    def _whole_moments(self, start: int, end: int, stop: int) -> int:
        """The end (P) of a window that does not cut a moment in two, unless the moment alone is over the limits.

        A window that begins inside a moment ends with it: later events must see all of that moment or none of it.
        """
        targets = self.events.targets
        moment = self.events.moment[targets[start : end + 1]]
        if targets[start] != moment[0]:
            return min(end, start + int(np.searchsorted(moment, moment[0], "right")))
        if end < stop and moment[end - start] == moment[end - start - 1] != moment[0]:
            return start + int(np.searchsorted(moment, moment[end - start], "left"))
        return end

    def _refuse(self, target: int, room: int) -> None:
        """Raise StreamError that names what does not fit: the header, or a target event (P) and its negatives."""
        event, limit = self.events.targets[target], self.rule.max_length
        row = self.events.rows[event]
        if room <= 0:
            user = self.log.user_ids[int(self.log.user_codes[row])].as_py()
            raise StreamError(
                f"header of user '{user}' takes all but {room} of the {limit} tokens of stream.max_length; "
                "shorten the header or raise max_length"
            )
        taken = self.negatives[target] >= 0
        texts = [int(self.tokens.event_text[event]), *self.tokens.negative_text[target][taken].tolist()]
        items = [int(self.log.item_codes[row]), *self.negatives[target][taken].tolist()]
        sizes = self.tokens.table.lengths[texts]
        item = self.log.items.column("item_id")[items[int(sizes.argmax())]].as_py()
        beside = " and its sampled negatives" if len(texts) > 1 else ""
        raise StreamError(
            f"item '{item}' takes {sizes.max()} tokens: the event of row {row} of {self.log.name}{beside} needs "
            f"{sizes.sum() + len(texts) * len(self.vocabulary.marker)} with markers, and stream.max_length {limit} "
            f"leaves {room}; shorten the item's text or raise max_length"
        )


def prefix_sums(values: np.ndarray) -> np.ndarray:
    """Sum of all values before each place; int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
