"""The table of a model's predictions, one row a target."""

from __future__ import annotations

import pyarrow as pa

from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.models.predict import Predictions


def prediction_table(predictions: Predictions, streams: StreamDataset, calibration: Calibration) -> pa.Table:
    """Columns split, user_id, item_id, timestamp, label, and p_<label> for each label; one row a target."""
    table = streams.describe(predictions.targets)
    probabilities = calibration.apply(predictions.logits)
    for number, label in enumerate(streams.domain.labels):
        table = table.append_column(f"p_{label}", pa.array(probabilities[:, number]))
    return table
