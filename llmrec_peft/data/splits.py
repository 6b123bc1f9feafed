"""Train, valid and test targets of a log, by one global time or by user, and the check that none leaks into another.

A split names *targets*: rows whose outcome is predicted. The history of a target is whatever its user did before, in
any split, so a split is a set of row numbers and never a cut of the log. Rows marked `context_only` are never targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llmrec_peft.errors import DataError

if TYPE_CHECKING:
    from llmrec_peft.data.log import BehaviorLog

NAMES = ("train", "valid", "test")
"""The splits, in time order."""

KINDS = ("time", "user")
"""How a log can be split."""

SHOWN = 3  # offenders that a message lists before it only counts


@dataclass(frozen=True)
class LogSplit:
    """The targets of one split: `rows` are sorted row numbers (int64) of `log`."""

    name: str
    log: BehaviorLog = field(repr=False)
    rows: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def users(self) -> np.ndarray:
        """Codes (int32, sorted, each once) of the users who have a target here."""
        # The log's rows go by user, so that a user's targets are neighbours.
        codes = self.log.user_codes[self.rows]
        return codes[np.diff(codes, prepend=-1) > 0]


@dataclass(frozen=True)
class Splits:
    """The three splits of one log. Iterating gives the names; `splits["valid"]` and `splits.items()` go by name.

    `boundaries` holds, for a split by time, the first moment of valid and that of test, in the log's seconds.
    """

    train: LogSplit
    valid: LogSplit
    test: LogSplit
    by: str
    boundaries: tuple[float, float] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)

    def __getitem__(self, name: str) -> LogSplit:
        if name not in NAMES:
            raise DataError(f"Splits: there is no split {name!r}; use one of {', '.join(NAMES)}")
        return getattr(self, name)

    def items(self) -> Iterator[tuple[str, LogSplit]]:
        """Yield (name, split), train first."""
        return ((name, self[name]) for name in NAMES)


def split_log(log: BehaviorLog, *, by: str = "time", valid: float = 0.1, test: float = 0.1, seed: int = 0) -> Splits:
    """Split the targets of `log` into train, valid and test.

    Args:
        log: the log; its `context_only` rows, if it has that column, become no target.
        by: `time` sets two boundaries for all users (train < t1 <= valid < t2 <= test), each at a moment of the log, so
            that rows of one moment stay together. `user` deals whole users, at random by `seed`.
        valid, test: shares, of target rows by time and of users by user; above 0, and below 1 together. The nearest
            share that the ties allow is taken.
        seed: of the users' shuffle; a split by time has no chance in it.

    Raises:
        DataError: an unknown `by`, shares out of range, all targets at one moment, or a split that would be empty.
    """
    if by not in KINDS:
        raise DataError(f"split: by must be one of {', '.join(KINDS)}, not {by!r}; set split.by in the domain file")
    for name, share in (("valid", valid), ("test", test)):
        if not 0 < share < 1:
            raise DataError(f"split: {name} must lie between 0 and 1, not {share!r}; a usual share is 0.1")
    if valid + test >= 1:
        raise DataError(f"split: valid + test must be below 1, not {valid} + {test}; nothing would be left to train on")
    targets = np.flatnonzero(~context_only(log))
    if not len(targets):
        raise DataError(
            f"split: all {len(log)} rows of log {log.name!r} are context_only; add rows that can be targets"
        )
    parts, boundaries = (
        _by_time(log, targets, valid, test) if by == "time" else _by_user(log, targets, valid, test, seed)
    )
    for name, rows in zip(NAMES, parts, strict=True):
        if not len(rows):
            raise DataError(
                f"split: {name} of log {log.name!r} is empty (by {by}, valid {valid}, test {test}, {len(targets)} "
                f"targets); give more data or a larger share"
            )
    train_split, valid_split, test_split = (LogSplit(name, log, rows) for name, rows in zip(NAMES, parts, strict=True))
    return Splits(train_split, valid_split, test_split, by, boundaries)


def context_only(log: BehaviorLog) -> np.ndarray:
    """Return bool [rows]: True where a row is history and can never be a target."""
    if "context_only" not in log.interactions.column_names:
        return np.zeros(len(log), dtype=bool)
    return log.column("context_only").to_numpy()


def check_leakage(splits: Splits) -> None:
    """Check that no target of a split can be known from another split.

    Raises:
        DataError: names the first offending rows (row number, user, time) and counts them, for a row that is a target
            twice, a `context_only` row that is a target, an earlier split's target that is not before a later split's
            first target (by time), or a user with targets in two splits (by user).
    """
    hidden = context_only(splits.train.log)
    for name, split in splits.items():
        _refuse(split, split.rows[1:][split.rows[1:] == split.rows[:-1]], f"targets of {name} twice", "list a row once")
        _refuse(split, split.rows[hidden[split.rows]], f"context_only and yet targets of {name}", "drop them")
    for position, name in enumerate(NAMES):
        for later in NAMES[position + 1 :]:
            _check_pair(splits[name], splits[later], splits.by)


def _check_pair(early: LogSplit, late: LogSplit, by: str) -> None:
    log = early.log
    both = early.rows[_marked(len(log), late.rows)[early.rows]]
    _refuse(early, both, f"targets of {early.name} and of {late.name}", "give each row to one split")
    if by == "time":
        first = log.timestamps[late.rows].min()
        wrong = early.rows[log.timestamps[early.rows] >= first]
        what = f"targets of {early.name} but not before the first target of {late.name} (time {first})"
        _refuse(early, wrong, what, "split by time with split_log")
    else:
        wrong = early.rows[_marked(log.num_users, late.users)[log.user_codes[early.rows]]]
        _refuse(early, wrong, f"of users with targets in both {early.name} and {late.name}", "give a user to one split")


def _marked(size: int, places: np.ndarray) -> np.ndarray:
    marks = np.zeros(size, dtype=bool)
    marks[places] = True
    return marks


def _refuse(split: LogSplit, rows: np.ndarray, what: str, advice: str) -> None:
    if not len(rows):
        return
    log = split.log
    shown = "; ".join(
        f"row {row} (user {log.user_ids[int(log.user_codes[row])].as_py()}, time {log.timestamps[row]})"
        for row in rows[:SHOWN].tolist()
    )
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    raise DataError(f"leakage in log {log.name!r}: {len(rows)} rows are {what}: {shown}{more}; {advice}")


def _by_time(log: BehaviorLog, targets: np.ndarray, valid: float, test: float):
    times = log.timestamps[targets]
    ordered = np.sort(times)
    if ordered[0] == ordered[-1]:
        raise DataError(
            f"split: all {len(times)} targets of log {log.name!r} have timestamp {ordered[0]}, so time cannot split "
            "them; use split.by: user"
        )
    # The cuts are places in `ordered` where the moment changes; both must exist for three splits to have rows.
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    if len(changes) < 2:
        raise DataError(
            f"split: the targets of log {log.name!r} have only 2 different timestamps, and three splits need 3; "
            "use split.by: user"
        )
    # The last change is kept free for test, the first for valid, so that neither cut can empty the split between them.
    start_valid = _nearest(changes[:-1], len(times) * (1 - valid - test))
    start_test = _nearest(changes[changes > start_valid], len(times) * (1 - test))
    first_valid, first_test = ordered[start_valid], ordered[start_test]
    parts = (
        targets[times < first_valid],
        targets[(times >= first_valid) & (times < first_test)],
        targets[times >= first_test],
    )
    return parts, (float(first_valid), float(first_test))


def _nearest(places: np.ndarray, wanted: float) -> int:
    return int(places[np.argmin(np.abs(places - wanted))])


def _by_user(log: BehaviorLog, targets: np.ndarray, valid: float, test: float, seed: int):
    codes = log.user_codes[targets]
    users = codes[np.diff(codes, prepend=-1) > 0]
    if len(users) < len(NAMES):
        raise DataError(
            f"split: log {log.name!r} has {len(users)} users with targets, and three splits by user need 3; "
            "give more users or use split.by: time"
        )
    shuffled = np.random.default_rng(seed).permutation(users)
    num_valid = max(1, round(len(users) * valid))
    num_test = max(1, round(len(users) * test))
    # 0: train, 1: valid, 2: test, by user code.
    part_of = np.zeros(log.num_users, dtype=np.int8)
    part_of[shuffled[:num_valid]] = 1
    part_of[shuffled[num_valid : num_valid + num_test]] = 2
    part = part_of[codes]
    return tuple(targets[part == number] for number in range(len(NAMES))), None
