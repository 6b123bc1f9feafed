"""Collaborative features of user-item pairs, the input of a fusion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmrec_peft.errors import DataError

GATES = ("log_user_events", "log_item_rows")
"""Features that every fusion has: log(1 + events of the user) and log(1 + training rows of the item)."""


@dataclass(frozen=True)
class Features:
    """Features of n targets: `values` float64 [n, F] with columns `names`, GATES last; NaN where unknown."""

    names: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names) or self.names[-2:] != GATES:
            raise DataError(
                f"features must be [n, {len(self.names)}] with {', '.join(GATES)} last, got {self.values.shape} with "
                f"{', '.join(self.names)}; take them from RetrievalIndex.features"
            )
