"""The systems that are compared on test: the LLM, each collaborative score, all of these, and their fusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.evaluation.bootstrap import Interval, differences, intervals
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import DEFAULT_NAMES, compute_metrics
from llmrec_peft.evaluation.stream_metrics import choose_metrics, users_of
from llmrec_peft.models.predict import Predictions
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.pair_features import GATES, Features
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex

METRICS = ("auc", "gauc", "logloss", "ece")
LLM, COLLABORATIVE, FUSED = "llm", "collaborative", "fused"

Intervals = dict[str, dict[str, Interval]]
"""Intervals by system, then by metric."""


@dataclass(frozen=True)
class FusionTargets:
    """Targets of one split with the two inputs of a fusion: the classifier's logits and the index's features.

    Attributes:
        streams: streams of the split.
        predictions: predictions for n targets, not calibrated.
        logits: float64 [n, labels], calibrated.
        features: features of the same n targets.
    """

    streams: StreamDataset
    predictions: Predictions
    logits: np.ndarray
    features: Features

    @classmethod
    def of(
        cls,
        streams: StreamDataset,
        predictions: Predictions,
        calibration: Calibration,
        index: RetrievalIndex,
        feedback: np.ndarray,
    ) -> FusionTargets:
        """Calibrate the predictions and look the targets up in the index; feedback: int [rows of the log]."""
        rows, items = streams.target_rows[predictions.targets], streams.target_items[predictions.targets]
        features = index.target_features(streams.log, feedback, rows, items)
        return cls(streams, predictions, calibration.shift(predictions.logits), features)

    @property
    def users(self) -> np.ndarray:
        """User code of each target, int32 [n]."""
        return users_of(self.predictions, self.streams)


def positive_classes(domain: Domain) -> tuple[bool, ...]:
    """Which labels are positive, in class order: all but the negative one."""
    return tuple(number != domain.negative_class for number in range(len(domain.labels)))


def fit_fusion(valid: FusionTargets, logits: np.ndarray, features: Features, seed: int) -> Fusion:
    """Fit a fusion of logits [n, labels] and features on the labels of the validation targets."""
    return Fusion.fit(
        logits, features, valid.predictions.labels, valid.users, positive=positive_classes(valid.streams.domain),
        seed=seed,
    )  # fmt: skip


def predict_systems(
    valid: FusionTargets, test: FusionTargets, fusion: Fusion, seed: int
) -> dict[str, np.ndarray]:  # fmt: skip
    """Probabilities [n, labels] of each system on the test targets.

    The systems without the LLM (each score alone, and all scores) use the same regression, gates and choice of prior,
    fitted on the same targets. In place of the LLM's logits they get constants: the log shares of the labels in
    validation.
    """
    labels = len(valid.streams.domain.labels)
    shares = np.bincount(valid.predictions.labels, minlength=labels) + 1.0  # one is added against log(0)
    constant = np.log(shares / shares.sum())
    valid_logits, test_logits = (np.tile(constant, (len(part.logits), 1)) for part in (valid, test))
    found = {LLM: Calibration().apply(test.logits)}
    scores = [name for name in test.features.names if name not in GATES]
    for system, names in [*((name, [name]) for name in scores), (COLLABORATIVE, scores)]:
        alone = fit_fusion(valid, valid_logits, _select(valid.features, names), seed)
        found[system] = alone.apply(test_logits, _select(test.features, names))
    return found | {FUSED: fusion.apply(test.logits, test.features)}


def _select(features: Features, names: list[str]) -> Features:
    """Some of the features, and the gates."""
    chosen = (*names, *GATES)
    return Features(chosen, features.values[:, [features.names.index(name) for name in chosen]])


def compare_systems(
    test: FusionTargets, systems: Mapping[str, np.ndarray], *, samples: int, seed: int
) -> tuple[Intervals, Intervals]:
    """Measure each system on test, and the fusion less each other system.

    Args:
        test: the targets.
        systems: probabilities [n, labels] by system.
        samples: number of bootstrap samples of users; 0 for values without intervals.
        seed: random seed of the bootstrap.
    """
    labels, users = test.predictions.labels, test.users
    candidate_sets = test.streams.target_sets[test.predictions.targets]
    names = [*METRICS, *(name for name in choose_metrics(test.streams, None) if name not in DEFAULT_NAMES)]
    others = {system: p for system, p in systems.items() if system != FUSED}
    if samples:
        values = {
            system: intervals(names, labels, p, users, candidate_sets, samples=samples, seed=seed)
            for system, p in systems.items()
        }
        gaps = {
            system: differences(names, labels, p, systems[FUSED], users, candidate_sets, samples=samples, seed=seed)
            for system, p in others.items()
        }
        return values, gaps
    bare = {system: compute_metrics(labels, p, users, candidate_sets, names) for system, p in systems.items()}
    return (
        {system: {name: _point(value) for name, value in by_name.items()} for system, by_name in bare.items()},
        {system: {name: _point(bare[FUSED][name] - bare[system][name]) for name in names} for system in others},
    )


def _point(value: float) -> Interval:
    """A value without an interval."""
    return Interval(value, np.nan, np.nan, level=np.nan, samples=0)
