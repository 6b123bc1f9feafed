"""What section "event stream" of the documentation says, row by row in plain Python: the measure of the fast code.

Nothing here uses the stream builder. A window is a list of answers; each answer is the prompt that a reader of the log
would write for it by hand.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field

import numpy as np

BREAKS = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u200b", "\u2028", "\u2029", "\ufeff"}


@dataclass
class Answer:
    """One target: its row, its item, its class, its moment, and the prompt that ends in its marker."""

    row: int
    item: int
    label: int
    moment: int
    prompt: list[int]
    sampled: bool


@dataclass
class Window:
    """Answers of one window, its tokens in all, and how many history events had no room."""

    answers: list[Answer] = field(default_factory=list)
    length: int = 0
    dropped: int = 0


class TooLong(Exception):
    """An event that no window can hold."""


class NaiveStreams:
    """All windows of one split; `negatives` maps a row to the item rows that were sampled for it."""

    def __init__(self, split, domain, tokenizer, negatives: dict[int, list[int]] | None = None, unlabelled=False):
        self.unlabelled = unlabelled
        self.domain, self.tokenizer, self.log = domain, tokenizer, split.log
        self.negatives = negatives or {}
        self.rows = split.log.interactions.to_pylist()
        self.items = split.log.items.to_pylist()
        self.codes = {item["item_id"]: number for number, item in enumerate(self.items)}
        self.targets = set(np.asarray(split.rows).tolist())
        self.marker = self.tokens(domain.marker)
        self.words = [self.tokens(word) for word in domain.outcomes.values()]
        whole, plain = tokenizer("Heat")["input_ids"], self.tokens("Heat")
        at = next(n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
        self.prefix, self.suffix = whole[:at], whole[at + len(plain) :]
        self.specials = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        self.twins: dict[tuple, list[int]] = {}
        for row in range(len(self.rows)):
            self.twins.setdefault(self.event_of(row), []).append(row)
        self.windows = [window for user in self.users() for window in self.cut(user)]

    # -- words -------------------------------------------------------------------------------------

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def clean(self, value) -> str:
        """A value on one line, with the marker and the special tokens broken up."""
        text = "" if value is None else str(value)
        text = " ".join("".join(" " if c in BREAKS or c.isspace() else c for c in text).split())
        for word in [self.domain.marker.strip(), *self.specials]:
            text = text.replace(word, word[0] + " " + word[1:])
        return text

    def fill(self, template: str, values: dict) -> str:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        return template.format(**{name: self.clean(values[name]) for name in names})

    def event(self, row: int, item: int) -> list[int]:
        return self.tokens(self.fill(self.domain.event, {**self.rows[row], **self.items[item]})) + self.marker

    def class_of(self, row: int) -> int:
        rule, labels = self.domain.label, list(self.domain.outcomes)
        value = self.rows[row][rule.column]
        if value is None and rule.missing == "leave_out":
            return -1
        if rule.above is not None:
            return int(value > rule.above)
        if rule.map is not None:
            return -1 if rule.map[str(value)] is None else labels.index(rule.map[str(value)])
        return labels.index(value) if isinstance(value, str) else int(value)

    def dropped(self, row: int) -> bool:
        """Whether another row of the same user, item and moment stays in a row's place."""
        if self.domain.duplicates == "keep":
            return False
        return any(self.worth(other) > self.worth(row) for other in self.twins[self.event_of(row)])

    def event_of(self, row: int) -> tuple:
        return tuple(self.rows[row][name] for name in ("user_id", "item_id", "timestamp"))

    def worth(self, row: int) -> tuple:
        return self.class_of(row) >= 0, not self.rows[row].get("context_only"), row

    # -- windows -----------------------------------------------------------------------------------

    def users(self):
        """For each user its labelled rows, and the others that are asked about, in time order, as dicts."""
        joining = self.domain.stream.history_labels
        users: dict[str, list[dict]] = {}
        for row, content in enumerate(self.rows):
            label = self.class_of(row)
            if self.dropped(row):
                continue
            if label >= 0 or (self.unlabelled and row in self.targets):
                name = list(self.domain.outcomes)[label]
                users.setdefault(content["user_id"], []).append(
                    {
                        "row": row,
                        "time": content["timestamp"],
                        "label": label,
                        "joins": label >= 0 and (joining is None or name in joining),
                        "target": row in self.targets,
                    }
                )
        for events in users.values():
            for place, event in enumerate(events):
                event["place"] = place
                same = place > 0 and events[place - 1]["time"] == event["time"]
                together = self.domain.simultaneous == "isolate" and same
                event["moment"] = events[place - 1]["moment"] if together else place
            yield events

    def finished(self, event: dict) -> list[int]:
        return self.event(event["row"], self.codes[self.rows[event["row"]]["item_id"]]) + self.words[event["label"]]

    def cut(self, events: list[dict]) -> list[Window]:
        """Windows of one user: as many targets as allowed, then as much of the newest history as there is room for."""
        rule, windows = self.domain.stream, []
        targets = [event for event in events if event["target"]]
        header = self.prefix + self.tokens(self.fill(self.domain.header, self.rows[events[0]["row"]]))
        limit = rule.max_length - len(self.suffix)
        while targets:
            count = 0
            while count < min(rule.targets, len(targets)):
                more = targets[: count + 1]
                # A window that begins inside a moment has lost the moment's beginning, so it ends with the moment.
                begun = more[0]["place"] != more[0]["moment"]
                if (begun and more[-1]["moment"] != more[0]["moment"]) or self.size(header, [], events, more) > limit:
                    break
                count += 1
            if not count:
                raise TooLong(self.rows[targets[0]["row"]]["item_id"])
            chosen = targets[:count]
            if count < len(targets) and targets[count]["moment"] == chosen[-1]["moment"] != chosen[0]["moment"]:
                chosen = [event for event in chosen if event["moment"] != chosen[-1]["moment"]]
            history = [event for event in events[: chosen[0]["moment"]] if event["joins"]]
            wanted = history[len(history) - min(rule.context, len(history)) :]
            kept = wanted
            while kept and self.size(header, kept, events, chosen) > limit:
                kept = kept[1:]
            windows.append(self.window(header, kept, events, chosen))
            windows[-1].dropped = len(wanted) - len(kept)
            targets = targets[len(chosen) :]
        return windows

    def items_of(self, event: dict) -> list[int]:
        return [self.codes[self.rows[event["row"]]["item_id"]], *self.negatives.get(event["row"], [])]

    def size(self, header, history, events, chosen) -> int:
        """Tokens: header, history, each answer's event, and what joins the prefix before the last moment."""
        total = len(header) + sum(len(self.finished(event)) for event in history)
        total += sum(len(self.event(event["row"], item)) for event in chosen for item in self.items_of(event))
        for event in events[chosen[0]["moment"] : chosen[-1]["moment"]]:
            if event["joins"]:
                alone = sum(other["moment"] == event["moment"] for other in events) == 1
                answered_there = alone and event["target"]
                total += len(self.words[event["label"]] if answered_there else self.finished(event))
        return total

    def window(self, header, history, events, chosen) -> Window:
        window = Window(length=self.size(header, history, events, chosen))
        for event in chosen:
            seen = history + [e for e in events[chosen[0]["moment"] : event["moment"]] if e["joins"]]
            prefix = header + [token for earlier in seen for token in self.finished(earlier)]
            for number, item in enumerate(self.items_of(event)):
                label = list(self.domain.outcomes).index(self.domain.negatives.label) if number and (
                    self.domain.negatives.label) else 0 if number else event["label"]  # fmt: skip
                moment = chosen_moment(events, event)
                prompt = prefix + self.event(event["row"], item)
                window.answers.append(Answer(event["row"], item, label, moment, prompt, number > 0))
        return window


def chosen_moment(events: list[dict], event: dict) -> int:
    """Row of the first event of an event's moment: a name that no other moment of the log has."""
    return events[event["moment"]]["row"]


def visible(stream, number: int) -> tuple[list[int], list[int]]:
    """Tokens and positions that answer `number` of a stream sees, by the documented mask, itself included."""
    query = int(stream.markers[number])
    keys = [k for k in range(query + 1) if stream.segment[k] in (0, stream.segment[query])]
    return [int(stream.input_ids[k]) for k in keys], [int(stream.position_ids[k]) for k in keys]


def sampled_items(streams) -> dict[int, list[int]]:
    """Row of each positive -> item rows that the data set sampled for it."""
    found: dict[int, list[int]] = {}
    for row, item in zip(streams.target_rows[streams.sampled], streams.target_items[streams.sampled], strict=True):
        found.setdefault(int(row), []).append(int(item))
    return found
