"""Split the target rows of a log into train, valid and test, by one global time or by user.

A split names *targets*: rows whose outcome is predicted. The history of a target is whatever its user did before, in
any split, so a split is a set of row numbers and never a cut of the log. Rows marked `context_only` are never targets.
"""

from __future__ import annotations

import numpy as np

from llmrec_peft.errors import DataError

NAMES = ("train", "valid", "test")
"""The splits, in time order."""

KINDS = ("time", "user")
"""How a log can be split."""

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Row numbers of train, valid and test, each int64 and sorted."""
Boundaries = tuple[float, float]
"""First moment of valid and first moment of test, in the log's seconds."""


def split_rows(
    users: np.ndarray,
    times: np.ndarray,
    context_only: np.ndarray,
    *,
    by: str,
    valid: float,
    test: float,
    seed: int,
    name: str,
) -> tuple[Parts, Boundaries | None]:
    """Split the rows of a log that can be targets into train, valid and test.

    Args:
        users: int32 [rows], user codes, non-decreasing.
        times: [rows], timestamps.
        context_only: bool [rows], rows that are never targets.
        by: `time` sets two boundaries for all users (train < t1 <= valid < t2 <= test), each at a moment of the log, so
            that rows of one moment stay together. `user` deals whole users, at random by `seed`.
        valid, test: fractions of target rows (by time) or of users (by user); above 0, and below 1 together. The
            nearest fraction that the ties allow is used.
        seed: random seed of the order of users; a split by time is deterministic.
        name: name of the log, for messages.

    Returns:
        The rows of each split, and the boundaries of a split by time.

    Raises:
        DataError: an unknown `by`, shares out of range, all targets at one moment, or a split that would be empty.
    """
    if by not in KINDS:
        raise DataError(f"split: by must be one of {', '.join(KINDS)}, not {by!r}; set split.by in the domain file")
    for key, share in (("valid", valid), ("test", test)):
        if not 0 < share < 1:
            raise DataError(f"split: {key} must lie between 0 and 1, not {share!r}; a usual share is 0.1")
    if valid + test >= 1:
        raise DataError(f"split: valid + test must be below 1, not {valid} + {test}; nothing would be left to train on")
    targets = np.flatnonzero(~context_only)
    if not len(targets):
        raise DataError(f"split: all {len(times)} rows of log {name!r} are context_only; add rows that can be targets")
    boundaries = None
    if by == "time":
        parts, boundaries = _by_time(targets, times[targets], valid, test, name)
    else:
        parts = _by_user(targets, users[targets], valid, test, seed, name)
    for split, rows in zip(NAMES, parts, strict=True):
        if not len(rows):
            raise DataError(
                f"split: {split} of log {name!r} is empty (by {by}, valid {valid}, test {test}, {len(targets)} "
                f"targets); give more data or a larger share"
            )
    return parts, boundaries


def _by_time(targets: np.ndarray, times: np.ndarray, valid: float, test: float, name: str) -> tuple[Parts, Boundaries]:
    ordered = np.sort(times)
    if ordered[0] == ordered[-1]:
        raise DataError(
            f"split: all {len(times)} targets of log {name!r} have timestamp {ordered[0]}, so time cannot split "
            "them; use split.by: user"
        )
    # The cuts are places in `ordered` where the moment changes; both must exist for three splits to have rows.
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    if len(changes) < 2:
        raise DataError(
            f"split: the targets of log {name!r} have only 2 different timestamps, and three splits need 3; "
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


def _by_user(targets: np.ndarray, codes: np.ndarray, valid: float, test: float, seed: int, name: str) -> Parts:
    users = codes[np.diff(codes, prepend=-1) > 0]
    if len(users) < len(NAMES):
        raise DataError(
            f"split: log {name!r} has {len(users)} users with targets, and three splits by user need 3; "
            "give more users or use split.by: time"
        )
    shuffled = np.random.default_rng(seed).permutation(users)
    num_valid = max(1, round(len(users) * valid))
    num_test = max(1, round(len(users) * test))
    # 0: train, 1: valid, 2: test, by user code.
    part_of = np.zeros(users[-1] + 1, dtype=np.int8)
    part_of[shuffled[:num_valid]] = 1
    part_of[shuffled[num_valid : num_valid + num_test]] = 2
    part = part_of[codes]
    return targets[part == 0], targets[part == 1], targets[part == 2]
