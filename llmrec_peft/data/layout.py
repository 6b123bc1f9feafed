"""One window as tokens: the trunk, and the probes that hang off it."""

from dataclasses import dataclass

import numpy as np

TRUNK = 0  # branch of the header and of the events that later ones see


@dataclass(frozen=True)
class Stream:
    """One window as tokens; L tokens, T targets.

    Attributes:
        input_ids: int32 [L].
        position_ids: int32 [L]; a probe's positions go on from the trunk point that it hangs off.
        branch: int32 [L]; 0 for the trunk, a new number for each probe.
        markers: int64 [T]; index of each answer's token.
        labels: int64 [T]; class numbers.
        lists: int64 [T]; targets with one number are alternatives at one moment.
        targets: int64 [T]; row numbers of `StreamDataset.targets`.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    branch: np.ndarray
    markers: np.ndarray
    labels: np.ndarray
    lists: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def independent(self, number: int, suffix: np.ndarray) -> "Stream":
        """The prompt of one target by itself: what it sees of this stream, and nothing else."""
        end, branch = self.markers[number], self.branch[self.markers[number]]
        seen = np.flatnonzero((self.branch[: end + 1] == TRUNK) | (self.branch[: end + 1] == branch))
        one = slice(number, number + 1)
        ids = np.concatenate([self.input_ids[seen], suffix])
        return Stream(ids, np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32),
                      np.array([len(seen) - 1]), self.labels[one], self.lists[one], self.targets[one])  # fmt: skip


class StreamBuilder:
    """Lays tokens down in order; L grows."""

    def __init__(self, trunk: list[np.ndarray]):
        self.pieces: list[np.ndarray] = []
        self.branches: list[int] = []
        self.starts: list[int] = []
        self.length = 0  # tokens laid down
        self.point = 0  # trunk tokens laid down, the next trunk position
        self.probes = 0
        for ids in trunk:
            self.trunk(ids)

    def trunk(self, *parts: np.ndarray) -> int:
        """Lay parts on the trunk; returns the index of the last token."""
        for ids in parts:
            self.pieces.append(ids)
            self.branches.append(TRUNK)
            self.starts.append(self.point)
            self.point += len(ids)
            self.length += len(ids)
        return self.length - 1

    def probe(self, event: np.ndarray, marker: np.ndarray) -> int:
        """Hang an event with its marker off the trunk as it is now; returns the index of the last token."""
        self.probes += 1
        position = self.point
        for ids in (event, marker):
            self.pieces.append(ids)
            self.branches.append(self.probes)
            self.starts.append(position)
            position += len(ids)
            self.length += len(ids)
        return self.length - 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sizes = np.array([len(ids) for ids in self.pieces])
        ends = np.cumsum(sizes)
        positions = np.arange(self.length) + np.repeat(np.array(self.starts) - (ends - sizes), sizes)
        branch = np.repeat(np.array(self.branches, np.int32), sizes)
        return np.concatenate(self.pieces).astype(np.int32), positions.astype(np.int32), branch


def window_start(events: int, window: int, stride: int) -> int:
    """The first of `events` history events that is used: at most `window` of them are.

    It moves on by `stride` at a time, so that a history that grows keeps its beginning, and with it what was computed
    for it, for `stride` events: between `window - stride + 1` and `window` events of a long history are used.
    """
    over = max(0, events - window)
    return -(-over // stride) * stride
