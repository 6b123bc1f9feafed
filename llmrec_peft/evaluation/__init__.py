"""Metrics, calibration, bootstrap, counting baselines and the report."""

from pathlib import Path


def load_metric():
    """The metrics as an `evaluate.Metric`, loaded from this package's own files, without the Hub.

    `load_metric().compute(predictions=p, references=y, users=ids)`; see `behavior_metrics/behavior_metrics.py`.
    """
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "behavior_metrics"))
