"""Predictions of one state of a classifier on the validation and test targets that a run measures."""

from dataclasses import dataclass

from llmrec_peft.models.predict import Predictions
from llmrec_peft.runs.run_directory import Run
from llmrec_peft.runs.split_streams import SplitStreams, limit_targets
from llmrec_peft.training.trainer import BehaviorTrainer


@dataclass(frozen=True)
class SplitPredictions:
    """Predictions on the validation targets and on the test targets."""

    valid: Predictions
    test: Predictions


def predict_splits(trainer: BehaviorTrainer, streams: SplitStreams, run: Run, when: str) -> SplitPredictions:
    """Predict the validation and test targets that the configuration limits; `when` names the state for people."""
    limits = run.config.evaluation
    valid = limit_targets(streams.valid, limits.valid_targets, trainer.model)
    test = limit_targets(streams.test, limits.test_targets, trainer.model)
    return SplitPredictions(
        valid=trainer.predict_streams(valid, f"valid {when}"), test=trainer.predict_streams(test, f"test {when}")
    )
