"""What a run leaves: metrics, predictions, bundle and report."""

import platform
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import gather_object

from llmrec_peft.checkpoints.bundle import save_bundle
from llmrec_peft.evaluation.baselines import past_rates, rate_baselines
from llmrec_peft.evaluation.calibration import Calibration, fit_calibration
from llmrec_peft.evaluation.predictions import measure, metric_names, prediction_table, users_of
from llmrec_peft.evaluation.report import ReportContent, count_slices, write_report
from llmrec_peft.files import write_json, write_parquet
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.predict import Predictions
from llmrec_peft.runs.output_paths import writing
from llmrec_peft.runs.run_directory import Run
from llmrec_peft.runs.split_streams import SplitStreams, limited
from llmrec_peft.training.trainer import BehaviorTrainer


@dataclass
class Timings:
    """Seconds that the parts of a run took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str, without: str | None = None):
        """Count the time inside under a name, but for what is counted inside under another."""
        start, other = time.perf_counter(), self.seconds.get(without, 0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start - (self.seconds.get(without, 0.0) - other)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


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
    """Temperature and biases, fitted on validation alone; the plain softmax where the configuration wants none."""
    wanted = run.config.evaluation
    return fit_calibration(valid.logits, valid.labels, wanted.prior) if wanted.calibrate else Calibration()


def save_run(
    run: Run,
    trainer: BehaviorTrainer,
    streams: SplitStreams,
    before: Answers | None,
    after: Answers,
    timings: Timings,
    save: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Write the bundle, predictions.parquet, report.md and metrics.json, in this order; returns the metrics.

    What took the longest to make is saved first, so that no failure of a report can lose it.

    save: takes the classifier, the domain's mapping, calibration, counts and metrics, and writes another form of model
        than a bundle.
    """
    calibration = calibrate(run, after.valid)
    names = metric_names(streams.train, run.config.evaluation.metrics)
    metrics = _metrics(streams, names, before, after, calibration)
    cost = _cost(trainer, timings)
    state = trainer.model.trainable_state_dict()  # gathered, where the processes hold a part each
    if not trainer.is_world_process_zero():
        return metrics
    model: BehaviorClassifier = trainer.model
    facts = {
        "calibration": calibration.to_dict() if run.config.evaluation.calibrate else None,
        "counts": {**streams.counts(), "split": streams.split_note()},
        "metrics": {name: metrics[name] for name in ("valid", "test")},
    }
    domain = streams.train.domain.to_dict()
    if save is None:
        save_bundle(run.path("bundle"), model, model.tokenizer, domain, state=state, **facts)
    else:
        save(model, domain, **facts)
    with writing(run.directory):
        return _write(run, trainer, streams, before, after, calibration, metrics, names, cost)


def _write(
    run: Run,
    trainer: BehaviorTrainer,
    streams: SplitStreams,
    before: Answers | None,
    after: Answers,
    calibration: Calibration,
    metrics: dict[str, Any],
    names: list[str],
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """Write predictions.parquet, report.md and metrics.json; returns the metrics."""
    tables = [prediction_table(getattr(after, name), streams[name], calibration) for name in ("valid", "test")]
    write_parquet(pa.concat_tables(tables), run.path("predictions.parquet"))
    content = _report_content(run, trainer, streams, before, after, calibration, cost)
    found = write_report(run.directory, content, names=names, samples=run.config.evaluation.bootstrap)
    metrics["baselines_test"] = {
        name: {key: value["value"] for key, value in found["intervals"][name].items()} for name in content.baselines
    }
    metrics |= {"intervals_test": found["intervals"], "differences_test": found["differences"]}
    metrics |= {"calibration": calibration.to_dict(), "cost": cost}
    # Last, since its presence says that the run is whole.
    write_json(metrics, run.path("metrics.json"))
    return metrics


def _metrics(
    streams: SplitStreams, names: list[str], before: Answers | None, after: Answers, calibration: Calibration
) -> dict[str, Any]:
    """Metrics before and after; `before` compares with the uncalibrated ones, as neither has seen a calibration."""
    states = {} if before is None else {"before": (before.valid, before.test, None)}
    states |= {"uncalibrated": (after.valid, after.test, None), "after": (after.valid, after.test, calibration)}
    keys = {"before": ("before", "before_test"), "uncalibrated": ("valid_uncalibrated", "test_uncalibrated"),
            "after": ("valid", "test")}  # fmt: skip
    found: dict[str, Any] = {}
    for state, (valid, test, used) in states.items():
        found[keys[state][0]] = measure(valid, streams.valid, names, calibration=used)
        found[keys[state][1]] = measure(test, streams.test, names, calibration=used)
    return found | {"baselines_test": {}}


def _cost(trainer: BehaviorTrainer, timings: Timings) -> dict[str, float | str]:
    found: dict[str, float | str] = {f"{name}, seconds": value for name, value in timings.seconds.items()}
    seen = torch.tensor(trainer.targets_seen, device=trainer.args.device)
    targets = int(trainer.accelerator.reduce(seen, "sum"))
    # Both are 0 where a resumed run had no step left to take.
    if targets and trainer.step_seconds:
        found["training steps alone, seconds"] = trainer.step_seconds
        found["training targets"] = targets
        found["training targets per second"] = targets / trainer.step_seconds
    # Linux counts in KiB, macOS in bytes.
    scale = 1 if platform.system() == "Darwin" else 1024
    peaks = gather_object([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9])
    found["peak memory, GB"] = max(peaks)  # of the process that had the most
    device = trainer.args.device.type
    found["device"] = f"{device}, {trainer.accelerator.num_processes} process(es)"
    if device == "cpu":
        found["device"] += f" of {torch.get_num_threads()} thread(s)"
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
        title=f"{test.domain.name}: {config.method_name} on {config.start}",
        class_names=test.domain.labels,
        labels=after.test.labels,
        users=users_of(after.test, test),
        after=calibration.apply(after.test.logits),
        before=None if before is None else Calibration().apply(before.test.logits),
        uncalibrated=Calibration().apply(after.test.logits) if config.evaluation.calibrate else None,
        baselines=_baselines(streams, targets),
        split_by=test.domain.split.by,
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
    train = train[classes[train] >= 0]
    if len(np.unique(classes[train])) < 2:
        return {}
    return rate_baselines(
        log.user_codes, log.item_codes, log.timestamps, classes,
        train, test.target_rows[targets], by=test.domain.split.by,
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
    keys = {
        ("valid", "before"): "before", ("valid", "after, raw"): "valid_uncalibrated", ("valid", "after"): "valid",
        ("test", "before"): "before_test", ("test", "after, raw"): "test_uncalibrated", ("test", "after"): "test",
    }  # fmt: skip
    shown = {title: metrics[key] for title, key in keys.items() if key in metrics}
    rows = [name for name in metrics["test"] if isinstance(metrics["test"][name], float)]
    width = max(len(name) for name in rows) + 2
    for line in (0, 1):
        print(("\n" if line == 0 else "") + " " * width + "".join(f"{title[line]:>14}" for title in shown))
    for name in rows:
        print(f"{name:<{width}}" + "".join(f"{values[name]:>14.4f}" for values in shown.values()))
    print("before and after, raw: not calibrated; valid is what calibration and the choice of the checkpoint have seen")
    for name, values in metrics["baselines_test"].items():
        text = ", ".join(f"{key} {values[key]:.4f}" for key in ("auc", "gauc", "logloss", "ece") if key in values)
        print(f"{name} on the same test targets: {text}")
    print(f"\nwritten to {run.directory}:")
    for name in ("bundle", "student", "metrics.json", "predictions.parquet", "report.md", "config.yaml", "logs"):
        if run.path(name).exists():
            print(f"  {run.path(name)}")
