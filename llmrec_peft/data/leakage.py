"""Check that no target of a split can be known from another split."""

from __future__ import annotations

import numpy as np

from llmrec_peft.data.log import LogSplit, Splits
from llmrec_peft.data.splits import NAMES
from llmrec_peft.errors import DataError

SHOWN = 3  # offenders that a message lists before it only counts


def check_leakage(splits: Splits) -> None:
    """Check that no target of a split can be known from another split.

    Raises:
        DataError: names the first offending rows (row number, user, time) and counts them, for a row that is a target
            twice, a `context_only` row that is a target, an earlier split's target that is not before a later split's
            first target (by time), or a user with targets in two splits (by user).
    """
    hidden = splits.train.log.context_only
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
        _refuse(early, wrong, what, "split by time with log.split")
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
