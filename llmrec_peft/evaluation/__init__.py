"""Metrics, calibration, bootstrap, counting baselines and the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate


def load_metric() -> evaluate.Metric:
    """Load the metrics as an `evaluate.Metric` from this package's own files, without the Hub.

    `load_metric().compute(predictions=p, references=y, users=ids)`; see `behavior_metrics/behavior_metrics.py`.
    """
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "behavior_metrics"))
