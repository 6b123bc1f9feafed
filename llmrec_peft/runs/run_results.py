"""Results of a training run: metrics before and after, the calibration, and the cost."""

import platform
import resource
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from llmrec_peft.checkpoints.bundle import TrainingRecord
from llmrec_peft.evaluation.calibration import Calibration, fit_calibration
from llmrec_peft.evaluation.stream_metrics import choose_metrics, measure
from llmrec_peft.runs.run_directory import Run
from llmrec_peft.runs.split_predictions import SplitPredictions
from llmrec_peft.runs.split_streams import SplitStreams
from llmrec_peft.runs.timings import Timings
from llmrec_peft.training.trainer import BehaviorTrainer


@dataclass(frozen=True)
class RunResults:
    """Predictions of a run and what was computed from them.

    Attributes:
        before: predictions of the untrained classifier; None where the configuration skips them.
        after: predictions of the trained classifier, not calibrated.
        calibration: fitted on validation alone.
        names: names of the metrics.
        metrics: metrics by the keys of metrics.json.
        cost: time and memory of the run, by the names that the report prints.
    """

    before: SplitPredictions | None
    after: SplitPredictions
    calibration: Calibration
    names: list[str]
    metrics: dict[str, Any]
    cost: dict[str, float | str]

    def training_record(self, run: Run, streams: SplitStreams) -> TrainingRecord:
        """Entries about the run in the behavior.json of a bundle or a student."""
        return TrainingRecord(
            calibration=self.calibration.to_dict() if run.config.evaluation.calibrate else None,
            counts={**streams.counts(), "split": streams.split_note()},
            metrics={name: self.metrics[name] for name in ("valid", "test")},
        )


def measure_run(
    run: Run,
    trainer: BehaviorTrainer,
    streams: SplitStreams,
    before: SplitPredictions | None,
    after: SplitPredictions,
    timings: Timings,
) -> RunResults:
    """Calibrate on validation, and measure before and after. All ranks must call this: the cost is summed over them."""
    wanted = run.config.evaluation
    calibration = Calibration()  # the plain softmax
    if wanted.calibrate:
        calibration = fit_calibration(after.valid.logits, after.valid.labels, wanted.prior)
    names = choose_metrics(streams.train, wanted.metrics)
    metrics = _metrics(streams, names, before, after, calibration)
    return RunResults(before, after, calibration, names, metrics, _cost(trainer, timings))


def _metrics(
    streams: SplitStreams,
    names: list[str],
    before: SplitPredictions | None,
    after: SplitPredictions,
    calibration: Calibration,
) -> dict[str, Any]:
    """Metrics of each state on both splits, by the keys of metrics.json.

    Compare `before` with the uncalibrated metrics, since neither state has seen a calibration.
    """
    states: list[tuple[str, str, SplitPredictions, Calibration | None]] = [
        ("valid_uncalibrated", "test_uncalibrated", after, None),
        ("valid", "test", after, calibration),
    ]
    if before is not None:
        states.insert(0, ("before", "before_test", before, None))
    found: dict[str, Any] = {}
    for valid, test, predictions, used in states:
        found[valid] = measure(predictions.valid, streams.valid, names, calibration=used)
        found[test] = measure(predictions.test, streams.test, names, calibration=used)
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
    found["peak memory, GB"] = max(peaks)  # of the process that used the most
    device = trainer.args.device.type
    threads = f" of {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
    found["device"] = f"{device}, {trainer.accelerator.num_processes} process(es){threads}"
    return found
