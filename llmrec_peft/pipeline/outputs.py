"""What a run leaves: metrics, predictions, bundle and report."""

import os
import platform
import resource
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..evaluation.baselines import past_rates, rate_baselines
from ..evaluation.calibration import Calibration, fit_calibration
from ..evaluation.report import ReportContent, count_slices, write_report
from ..models.bundle import save_bundle
from ..models.classifier import BehaviorClassifier
from ..models.predict import Predictions
from ..training.trainer import BehaviorTrainer
from .answers import measure, metric_names, prediction_table, users_of
from .run import Run, write_json
from .streams import SplitStreams, limited


@dataclass
class Costs:
    """Seconds that the parts of a run took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str):
        """Count the time inside under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Answers:
    """Answers of one state of the classifier on the validation and test targets that a run measures."""

    valid: Predictions
    test: Predictions


def answer(trainer: BehaviorTrainer, streams: SplitStreams, run: Run, when: str) -> Answers:
    """Answer the validation and test targets that the configuration asks for."""
    limits = run.config.evaluation
    parts = {"valid": limits.valid_targets, "test": limits.test_targets}
    found = {
        name: trainer.predict_streams(limited(streams[name], limit, trainer.model), f"{name} {when}")
        for name, limit in parts.items()
    }
    return Answers(**found)


def calibrate(run: Run, valid: Predictions) -> Calibration:
    """Temperature and prior, fitted on validation alone; the plain softmax where the configuration wants none."""
    return fit_calibration(valid.logits, valid.labels) if run.config.evaluation.calibrate else Calibration()


def save_run(
    run: Run,
    trainer: BehaviorTrainer,
    streams: SplitStreams,
    before: Answers | None,
    after: Answers,
    costs: Costs,
) -> dict[str, Any]:
    """Write the bundle, metrics.json, predictions.parquet and report.md; returns the metrics.

    Test answers are measured here, once, after training, selection and calibration have ended.
    """
    calibration = calibrate(run, after.valid)
    names = run.config.evaluation.metrics
    metrics: dict[str, Any] = {}
    if before is not None:
        metrics["before"] = measure(before.valid, streams.valid, names=names)
        metrics["before_test"] = measure(before.test, streams.test, names=names)
    metrics["valid"] = measure(after.valid, streams.valid, calibration=calibration, names=names)
    metrics["test"] = measure(after.test, streams.test, calibration=calibration, names=names)
    metrics["baselines_test"] = {}
    cost = _cost(trainer, costs)
    if not trainer.is_world_process_zero():
        return metrics
    model: BehaviorClassifier = trainer.model
    content = _report_content(run, trainer, streams, before, after, calibration, cost)
    found = write_report(
        run.directory, content, names=metric_names(streams.test, names), samples=run.config.evaluation.bootstrap
    )
    metrics["baselines_test"] = {
        name: {key: value["value"] for key, value in found["intervals"][name].items()} for name in content.baselines
    }
    metrics |= {"intervals_test": found["intervals"], "differences_test": found["differences"]}
    metrics |= {"calibration": calibration.to_dict(), "cost": cost}
    write_predictions(run.path("predictions.parquet"), [
        prediction_table(after.valid, streams.valid, calibration),
        prediction_table(after.test, streams.test, calibration),
    ])  # fmt: skip
    save_bundle(
        run.path("bundle"),
        model,
        model.tokenizer,
        run.config.domain.to_dict(),
        calibration=calibration.to_dict() if run.config.evaluation.calibrate else None,
        counts=streams.counts(),
        metrics={name: metrics[name] for name in ("valid", "test")},
    )
    # Last, since its presence says that the run is whole.
    write_json(run.path("metrics.json"), metrics)
    return metrics


def write_predictions(path, tables: list[pa.Table]) -> None:
    """Write predictions as parquet, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    pq.write_table(pa.concat_tables(tables), temporary)
    os.replace(temporary, path)


def _cost(trainer: BehaviorTrainer, costs: Costs) -> dict[str, float | str]:
    training = costs.seconds.get("training", 0.0)
    found: dict[str, float | str] = {f"{name}, seconds": value for name, value in costs.seconds.items()}
    if training and trainer.targets_seen:
        found["training targets"] = trainer.targets_seen * trainer.accelerator.num_processes
        found["training targets per second"] = found["training targets"] / training
    # Linux counts in KiB, macOS in bytes.
    scale = 1 if platform.system() == "Darwin" else 1024
    found["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
    found["device"] = f"{trainer.args.device.type}, {trainer.accelerator.num_processes} process(es)"
    return found


def _report_content(
    run: Run,
    trainer: BehaviorTrainer,
    streams: SplitStreams,
    before: Answers | None,
    after: Answers,
    calibration: Calibration,
    cost: Mapping[str, Any],
) -> ReportContent:
    config, test = run.config, streams.test
    trainable, total = trainer.model.trainable_parameters()
    targets = after.test.targets
    return ReportContent(
        title=f"{config.domain.name}: {config.method_name} on {config.model.base}",
        class_names=test.domain.labels,
        labels=after.test.labels,
        users=users_of(after.test, test),
        after=calibration.apply(after.test.logits),
        before=None if before is None else Calibration().apply(before.test.logits),
        uncalibrated=Calibration().apply(after.test.logits) if config.evaluation.calibrate else None,
        baselines=_baselines(streams, targets),
        lists=test.target_lists[targets],
        slices=_slices(streams, targets),
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
        cost=cost,
    )


def _baselines(streams: SplitStreams, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Counting rates beside the model, where every target is a logged event with one of two labels."""
    test, log = streams.test, streams.log
    if len(test.domain.labels) != 2 or test.sampled.any():
        return {}
    classes = test.domain.classes(log)
    train = streams.splits.train.rows
    return rate_baselines(
        log.user_codes, log.item_codes, log.timestamps, classes,
        train[classes[train] >= 0], test.target_rows[targets], by=test.domain.split.by,
    )  # fmt: skip


def _slices(streams: SplitStreams, targets: np.ndarray) -> dict[str, list[tuple[str, np.ndarray]]]:
    test, log = streams.test, streams.log
    rows = test.target_rows[targets]
    seen = np.bincount(log.item_codes[streams.splits.train.rows], minlength=log.num_items)
    history = past_rates(
        log.user_codes, log.item_codes, log.timestamps, (test.domain.classes(log) > 0).astype(int),
        train_rows=streams.splits.train.rows,
    ).user_count[rows]  # fmt: skip
    return {
        "the user's history": count_slices(history, [10, 50, 200], "earlier events"),
        "what training knows of the item": count_slices(seen[test.target_items[targets]], [1, 10, 50],
                                                        "training events"),
    }  # fmt: skip


def print_results(run: Run, metrics: Mapping[str, Any]) -> None:
    """The table of before and after, and where everything lies."""
    columns = {
        "before (valid)": "before",
        "after (valid)": "valid",
        "before (test)": "before_test",
        "after (test)": "test",
    }
    shown = {title: metrics[key] for title, key in columns.items() if key in metrics}
    rows = [name for name in metrics["test"] if isinstance(metrics["test"][name], float)]
    width = max(len(name) for name in rows) + 2
    print("\n" + " " * width + "".join(f"{title:>18}" for title in shown))
    for name in rows:
        print(f"{name:<{width}}" + "".join(f"{values[name]:>18.4f}" for values in shown.values()))
    for name, values in metrics["baselines_test"].items():
        shown = ", ".join(f"{key} {values[key]:.4f}" for key in ("auc", "gauc", "logloss", "ece") if key in values)
        print(f"{name} on the same test targets: {shown}")
    print(f"\nwritten to {run.directory}:")
    for name in ("bundle", "metrics.json", "predictions.parquet", "report.md", "config.yaml", "logs"):
        print(f"  {run.path(name)}")
