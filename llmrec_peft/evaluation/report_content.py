"""Contents of a report: predictions of one run on the test targets, and metadata of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmrec_peft.evaluation.baselines import SplitBy

Slices = Mapping[str, Sequence[tuple[str, np.ndarray]]]


@dataclass(frozen=True)
class ReportContent:
    """Contents of a report, for n test targets and C classes.

    Attributes:
        labels: int [n].
        users: ids [n].
        after: [n, C] the trained model's probabilities; calibrated, if `uncalibrated` is given too.
        before: [n, C] the untrained model's.
        uncalibrated: [n, C] the trained model's before calibration.
        baselines: name to [n, C], or to [n] of the last of 2 classes.
        split_by: how the log was split.
        candidate_sets: ids [n].
        slices: heading to (name, mask [n]) pairs, see `count_slices`.
        log_history: `Trainer.state.log_history`.
        run, data, cost: name to number or text, printed as given. A value of `data` that is a mapping itself becomes a
            column of a table, such as {"train": {"targets": 4503, "users": 300}, "test": {...}}.
    """

    title: str
    class_names: Sequence[str]
    labels: np.ndarray
    users: np.ndarray
    after: np.ndarray
    before: np.ndarray | None = None
    uncalibrated: np.ndarray | None = None
    baselines: Mapping[str, np.ndarray] = field(default_factory=dict)
    split_by: SplitBy = "time"
    candidate_sets: np.ndarray | None = None
    slices: Slices = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)


def count_slices(counts: np.ndarray, edges: Sequence[int], unit: str) -> list[tuple[str, np.ndarray]]:
    """Slices of targets by a count [n]: below edges[0], then from each edge to the next, and from the last up.

    count_slices(history, [1, 5, 20], "earlier events") gives "0 earlier events", "1 to 4 ...", "5 to 19 ...",
    "20 or more ...". Empty slices are left out.
    """
    counts = np.asarray(counts)
    bounds: list[int] = [0, *edges]
    ends: list[int | None] = [*edges, None]
    found = []
    for low, high in zip(bounds, ends, strict=True):
        mask = (counts >= low) if high is None else (counts >= low) & (counts < high)
        text = f"{low:,} or more" if high is None else f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        if mask.any():
            found.append((f"{text} {unit}", mask))
    return found
