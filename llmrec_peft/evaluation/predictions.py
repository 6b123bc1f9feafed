"""From answers to metrics, calibration and tables of predictions."""

import numpy as np
import pyarrow as pa

from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import DEFAULT_NAMES, compute_metrics
from llmrec_peft.models.predict import Predictions

# Places that ranking is measured at: the largest below the size of the usual list.
PLACES = (10, 5, 3, 1)


def metric_names(streams: StreamDataset, names: list[str] | None) -> list[str]:
    """The names asked for; by default the usual ones, and ranking where several items compete at one moment.

    Ranking looks at the first k places, k of `PLACES` below the median number of competitors: in lists of 5, the chance
    of a hit among the first 10 is always 1.
    """
    if names:
        return [*names, *(["targets"] if "targets" not in names else [])]
    sizes = np.unique(streams.target_lists, return_counts=True)[1]
    competing = sizes[sizes > 1]
    if not len(competing):
        return list(DEFAULT_NAMES)
    k = next(k for k in PLACES if k < max(2, np.median(competing)))
    # At the first place alone, all three are the same number.
    return [*DEFAULT_NAMES, *((f"ndcg@{k}", f"hr@{k}", f"mrr@{k}") if k > 1 else ("hr@1",))]


def measure(
    predictions: Predictions,
    streams: StreamDataset,
    names: list[str],
    *,
    calibration: Calibration | None = None,
) -> dict[str, float | int]:
    """Named metrics of answers on `streams`."""
    probabilities = (calibration or Calibration()).apply(predictions.logits)
    return compute_metrics(
        predictions.labels,
        probabilities,
        users=users_of(predictions, streams),
        lists=streams.target_lists[predictions.targets],
        names=names,
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
