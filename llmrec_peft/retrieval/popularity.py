"""Popularity: how often an item was taken, recent events counting more; and the half-life that fits a log best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import ConfigError
from llmrec_peft.retrieval.collaborative_model import Arrays, CollaborativeModel
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.item_codes import Codes

DAY = 86_400.0  # seconds
HALF_LIVES = (7.0, 30.0, 90.0, 365.0, 1460.0, None)
"""Days that `choose_half_life` tries."""
NEWEST_SHARE = 0.1
"""Share of the training positives, the newest, that `choose_half_life` predicts from the older ones."""


@dataclass
class Popularity(CollaborativeModel):
    """Positive events of an item, with exponential decay in time.

        weight(i) = sum over positive events of i of 2 ** -(age / half_life)
        score(i)  = log(1 + weight(i))

    The age of an event is counted from the last training row. The logarithm suits a logistic regression.
    """

    NAME: ClassVar[str] = "popularity"
    ARRAYS: ClassVar[dict[str, str]] = {"weights": "items"}

    half_life: float | None = None
    """Days; None counts all events alike, which is for logs without real times."""

    def _check(self) -> None:
        if self.half_life is not None and not self.half_life > 0:
            raise ConfigError(f"popularity: half_life must be days above 0 or None, not {self.half_life}; correct it")

    def _fit(self, log: BehaviorLog, rows: Codes, positive: NDArray[np.bool_]) -> Arrays:
        taken, weight = rows[positive], None
        if self.half_life is not None:
            age = (log.timestamps[rows].max() - log.timestamps[taken]) / (self.half_life * DAY)
            # An old event must not underflow to 0, which would make its item unknown.
            weight = np.maximum(np.exp2(-age), np.finfo(np.float32).tiny)
        counts = np.bincount(log.item_codes[taken], weight, log.num_items)
        return {"weights": counts.astype(np.float64)}

    def score_all(self, histories: Histories) -> np.ndarray:
        weights = self.arrays["weights"]
        # The same row for each user.
        row = np.where(weights > 0, np.log1p(weights), -np.inf)
        return np.broadcast_to(row, (len(histories), len(row)))

    def score_pairs(self, histories: Histories, owners: Codes, candidates: Codes) -> np.ndarray:
        return np.log1p(self._item("weights", candidates))


def choose_half_life(log: BehaviorLog, rows: ArrayLike, labels: np.ndarray) -> float | None:
    """The half-life in days (one of HALF_LIVES) whose popularity predicts the newest training positives best.

    Weights are fitted on the older positives in `rows`. The choice maximises the mean log-likelihood of the newest
    tenth, with p(i) = (scaled weight(i) + 1) / sum. Returns None, for no decay, where there is nothing to compare.
    """
    taken = np.asarray(rows, np.int64)
    taken = taken[labels[taken] == 1]
    times = log.timestamps[taken]
    if not len(taken) or times.min() == times.max():
        return None
    # All rows of the cut's moment are among the newer ones, so that no basket is divided.
    order = np.argsort(times, kind="stable")
    cut = times[order[int(len(taken) * (1 - NEWEST_SHARE))]]
    older, newer = taken[times < cut], taken[times >= cut]
    if not len(older):
        return None
    likelihoods: dict[float | None, float] = {}
    for days in HALF_LIVES:
        if days:
            weights = Popularity(days).fit(log, older, labels).arrays["weights"]
        else:
            weights = np.bincount(log.item_codes[older], minlength=log.num_items)
        # Scaled to the same sum: a short half-life leaves little weight, and the added 1 would hide it.
        weights = weights * (len(older) / weights.sum()) + 1
        likelihoods[days] = float(np.log(weights[log.item_codes[newer]] / weights.sum()).mean())
    return max(likelihoods, key=likelihoods.__getitem__)
