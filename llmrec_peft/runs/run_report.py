"""Outputs of a training run beside its model: predictions.parquet, report.md and metrics.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec_peft.evaluation.baselines import past_rates, rate_baselines
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.prediction_table import prediction_table
from llmrec_peft.evaluation.report import write_report
from llmrec_peft.evaluation.report_content import ReportContent, count_slices
from llmrec_peft.evaluation.stream_metrics import users_of
from llmrec_peft.files import write_json, write_parquet, writing
from llmrec_peft.runs.run_directory import Run
from llmrec_peft.runs.run_results import RunResults
from llmrec_peft.runs.split_streams import SplitStreams
from llmrec_peft.training.trainer import BehaviorTrainer

COLUMNS = {
    ("valid", "before"): "before", ("valid", "after, raw"): "valid_uncalibrated", ("valid", "after"): "valid",
    ("test", "before"): "before_test", ("test", "after, raw"): "test_uncalibrated", ("test", "after"): "test",
}  # fmt: skip
"""Titles of the printed table, in two lines, and the keys of metrics.json under them."""


def report_run(run: Run, trainer: BehaviorTrainer, streams: SplitStreams, results: RunResults) -> dict[str, Any]:
    """Write predictions.parquet, report.md and metrics.json on the main process.

    Returns:
        What metrics.json holds; without baselines and intervals on the other processes.
    """
    metrics = results.metrics
    if not trainer.is_world_process_zero():
        return metrics
    with writing(run.directory):
        tables = [
            prediction_table(results.after.valid, streams.valid, results.calibration),
            prediction_table(results.after.test, streams.test, results.calibration),
        ]
        write_parquet(pa.concat_tables(tables), run.path("predictions.parquet"))
        content = _report_content(run, trainer, streams, results)
        samples = run.config.evaluation.bootstrap
        found = write_report(run.directory, content, names=results.names, samples=samples)
        metrics["baselines_test"] = {
            name: {key: value["value"] for key, value in found["intervals"][name].items()} for name in content.baselines
        }
        metrics |= {"intervals_test": found["intervals"], "differences_test": found["differences"]}
        metrics |= {"calibration": results.calibration.to_dict(), "cost": results.cost}
        # Written last: its presence marks the run as complete.
        write_json(metrics, run.path("metrics.json"))
    return metrics


def _report_content(run: Run, trainer: BehaviorTrainer, streams: SplitStreams, results: RunResults) -> ReportContent:
    config, test, calibration = run.config, streams.test, results.calibration
    before, after = results.before, results.after.test
    trainable, total = trainer.model.trainable_parameters()
    return ReportContent(
        title=f"{test.domain.name}: {config.method_name} on {config.start}",
        class_names=test.domain.labels,
        labels=after.labels,
        users=users_of(after, test),
        after=calibration.apply(after.logits),
        before=None if before is None else Calibration().apply(before.test.logits),
        uncalibrated=Calibration().apply(after.logits) if config.evaluation.calibrate else None,
        baselines=_baselines(streams, after.targets),
        split_by=test.domain.split.by,
        candidate_sets=test.target_sets[after.targets],
        slices=_slices(streams, after.targets),
        log_history=trainer.state.log_history,
        run={
            "trained parameters": trainable,
            "all parameters": total,
            "steps": trainer.state.global_step,
            "best step": trainer.state.best_global_step or "the last",
            "temperature": calibration.temperature,
            "data": f"{streams.log.name} ({config.data.path})",
        },
        data=streams.counts(),
        cost=results.cost,
    )


def _baselines(streams: SplitStreams, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Probabilities of counting baselines on test targets [n]; none unless targets are logged events of 2 labels."""
    test, log = streams.test, streams.log
    if len(test.domain.labels) != 2 or test.sampled.any():
        return {}
    classes = test.domain.classes(log)
    train = streams.splits.train.rows
    train = train[classes[train] >= 0]
    if len(np.unique(classes[train])) < 2:
        return {}
    return rate_baselines(
        log.user_codes, log.item_codes, log.timestamps, classes,
        train, test.target_rows[targets], by=test.domain.split.by,
    )  # fmt: skip


def _slices(streams: SplitStreams, targets: np.ndarray) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Masks [n] of test targets by the length of the user's history and by the item's count in training."""
    test, log = streams.test, streams.log
    rows = test.target_rows[targets]
    seen = np.bincount(log.item_codes[streams.splits.train.rows], minlength=log.num_items)
    history = past_rates(
        log.user_codes, log.item_codes, log.timestamps, (test.domain.classes(log) > 0).astype(int),
        train_rows=streams.splits.train.rows,
    ).user_count[rows]  # fmt: skip
    item = seen[test.target_items[targets]]
    return {
        "the user's history": count_slices(history, [10, 50, 200], "earlier events"),
        "what training knows of the item": count_slices(item, [1, 10, 50], "training events"),
    }


def print_results(run: Run, metrics: Mapping[str, Any]) -> None:
    """Print the metrics before and after, and the place of each output."""
    shown = {title: metrics[key] for title, key in COLUMNS.items() if key in metrics}
    rows = [name for name in metrics["test"] if isinstance(metrics["test"][name], float)]
    width = max(len(name) for name in rows) + 2
    for line in (0, 1):
        print(("\n" if line == 0 else "") + " " * width + "".join(f"{title[line]:>14}" for title in shown))
    for name in rows:
        print(f"{name:<{width}}" + "".join(f"{values[name]:>14.4f}" for values in shown.values()))
    print("before and after, raw: not calibrated; valid: the calibration and the best checkpoint are chosen on it")
    for name, values in metrics["baselines_test"].items():
        text = ", ".join(f"{key} {values[key]:.4f}" for key in ("auc", "gauc", "logloss", "ece") if key in values)
        print(f"{name} on the same test targets: {text}")
    print(f"\nwritten to {run.directory}:")
    for name in ("bundle", "student", "metrics.json", "predictions.parquet", "report.md", "config.yaml", "logs"):
        if run.path(name).exists():
            print(f"  {run.path(name)}")
