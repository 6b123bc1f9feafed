"""From answers to metrics, calibration and tables of predictions."""

import numpy as np
import pyarrow as pa

from ..data.streams import StreamDataset
from ..evaluation.calibration import Calibration
from ..evaluation.metrics import DEFAULT_NAMES, compute_metrics
from ..models.predict import Predictions

RANKING = ("ndcg@10", "hr@10", "mrr@10")


def metric_names(streams: StreamDataset, names: list[str] | None) -> list[str]:
    """The names asked for; by default the usual ones, and ranking where several items compete at one moment."""
    if names:
        return [*names, *(["targets"] if "targets" not in names else [])]
    competing = len(streams.target_lists) > len(np.unique(streams.target_lists))
    return [*DEFAULT_NAMES, *(RANKING if competing else ())]


def measure(
    predictions: Predictions,
    streams: StreamDataset,
    *,
    calibration: Calibration | None = None,
    names: list[str] | None = None,
) -> dict[str, float | int]:
    """Metrics of answers on `streams`, by name."""
    probabilities = (calibration or Calibration()).apply(predictions.logits)
    return compute_metrics(
        predictions.labels,
        probabilities,
        users=users_of(predictions, streams),
        lists=streams.target_lists[predictions.targets],
        names=metric_names(streams, names),
    )


def users_of(predictions: Predictions, streams: StreamDataset) -> np.ndarray:
    """User of each answer, int32 [n]."""
    return streams.log.user_codes[streams.target_rows[predictions.targets]]


def prediction_table(predictions: Predictions, streams: StreamDataset, calibration: Calibration) -> pa.Table:
    """Columns split, user_id, item_id, timestamp, label, and p_<label> for each label; one row a target."""
    table = streams.describe(predictions.targets)
    probabilities = calibration.apply(predictions.logits)
    for number, label in enumerate(streams.domain.labels):
        table = table.append_column(f"p_{label}", pa.array(probabilities[:, number]))
    return table
