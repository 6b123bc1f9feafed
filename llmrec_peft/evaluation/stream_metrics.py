"""Metrics of a model's predictions on the streams that they were made for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import DEFAULT_NAMES, compute_metrics
from llmrec_peft.models.predict import Predictions

CUTOFFS = (10, 5, 3, 1)
"""Values of k for the ranking metrics: the largest below the size of the usual candidate set is used."""


def choose_metrics(streams: StreamDataset, names: list[str] | None) -> list[str]:
    """The names that were requested; by default the usual ones, and ranking where several items compete at one moment.

    Ranking metrics use the largest k of CUTOFFS below the median size of the candidate sets: with 5 candidates, the
    chance of a hit in the first 10 is always 1.
    """
    if names:
        return [*names, *(["targets"] if "targets" not in names else [])]
    sizes = np.unique(streams.target_sets, return_counts=True)[1]
    competing = sizes[sizes > 1]
    if not len(competing):
        return list(DEFAULT_NAMES)
    k = next(k for k in CUTOFFS if k < max(2, np.median(competing)))
    # At k = 1 all three are the same number.
    return [*DEFAULT_NAMES, *((f"ndcg@{k}", f"hr@{k}", f"mrr@{k}") if k > 1 else ("hr@1",))]


def measure(
    predictions: Predictions,
    streams: StreamDataset,
    names: list[str],
    *,
    calibration: Calibration | None = None,
) -> dict[str, float | int]:
    """Named metrics of predictions on `streams`."""
    probabilities = (calibration or Calibration()).apply(predictions.logits)
    return compute_metrics(
        predictions.labels,
        probabilities,
        users=users_of(predictions, streams),
        candidate_sets=streams.target_sets[predictions.targets],
        names=names,
    )


def users_of(predictions: Predictions, streams: StreamDataset) -> NDArray[np.int32]:
    """User of each prediction, int32 [n]."""
    return streams.log.user_codes[streams.target_rows[predictions.targets]]
