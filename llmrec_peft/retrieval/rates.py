"""User and item rates: smoothed shares of positives, as log-odds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.evaluation.baselines import STRENGTH
from llmrec_peft.retrieval.collaborative_model import Arrays, CollaborativeModel
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.item_codes import Codes


@dataclass
class UserItemRates(CollaborativeModel):
    """Smoothed shares of positives among the item's training rows and the user's history.

        rate  = (positives + STRENGTH * overall) / (rows + STRENGTH)
        score = logit(item rate) + logit(user rate) - logit(overall)

    As in `evaluation.baselines`, but counted over the training rows alone. `item_logits` and `user_logits` give the
    two terms apart.
    """

    NAME: ClassVar[str] = "rates"
    ARRAYS: ClassVar[dict[str, str]] = {"rows": "items", "positives": "items", "totals": "total"}

    def _fit(self, log: BehaviorLog, rows: Codes, positive: NDArray[np.bool_]) -> Arrays:
        items = log.item_codes[rows]
        counts = np.bincount(items, minlength=log.num_items)
        taken = np.bincount(items[positive], minlength=log.num_items)
        totals = np.array([len(rows), positive.sum()], np.int64)
        return {"rows": counts.astype(np.int64), "positives": taken.astype(np.int64), "totals": totals}

    @property
    def overall(self) -> float:
        """Rate of all training rows, smoothed towards 1/2."""
        rows, positives = self.arrays["totals"]
        return float((positives + STRENGTH / 2) / (rows + STRENGTH))

    def item_rates(self) -> NDArray[np.float64]:
        """float64 [num_items]."""
        return self._rate(self.arrays["positives"], self.arrays["rows"])

    def item_logits(self, candidates: Codes) -> NDArray[np.float64]:
        """float64 [n]; that of the overall rate for unknown items."""
        return _logit(self._rate(self._item("positives", candidates), self._item("rows", candidates)))

    def user_logits(self, histories: Histories) -> NDArray[np.float64]:
        """float64 [u]; that of the overall rate without a history."""
        positives = np.bincount(histories.owners, histories.positive, len(histories))
        return _logit(self._rate(positives, histories.counts))

    def score_all(self, histories: Histories) -> np.ndarray:
        items = _logit(self.item_rates())
        items = np.where(self.arrays["rows"] > 0, items, -np.inf)  # unknown items are never retrieved
        return self.user_logits(histories)[:, None] + (items - _logit(self.overall))[None, :]

    def score_pairs(self, histories: Histories, owners: Codes, candidates: Codes) -> np.ndarray:
        return self.user_logits(histories)[owners] + self.item_logits(candidates) - _logit(self.overall)

    def _rate(self, positives: np.ndarray, rows: np.ndarray) -> NDArray[np.float64]:
        return (positives + STRENGTH * self.overall) / (rows + STRENGTH)


def _logit(rate: ArrayLike) -> NDArray[np.float64]:
    return np.log(rate) - np.log1p(np.negative(rate))
