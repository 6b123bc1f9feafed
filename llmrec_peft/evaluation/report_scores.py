"""The report's numbers: metrics of each system with intervals, and paired differences to the trained model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrec_peft.evaluation.bootstrap import Interval, differences, intervals
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.evaluation.report_content import ReportContent

TRAINED = "uncalibrated"
"""System that is compared with `before` where the run is calibrated: neither of the two is."""

ByMetric = dict[str, Interval]


@dataclass(frozen=True)
class Scores:
    """Intervals by system and metric, and those of after - system. Systems: see `systems_of`."""

    intervals: dict[str, ByMetric]
    differences: dict[str, ByMetric]

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Plain mappings for JSON."""
        return {
            part: {system: {name: i.to_dict() for name, i in by_name.items()} for system, by_name in by_system.items()}
            for part, by_system in (("intervals", self.intervals), ("differences", self.differences))
        }


def systems_of(content: ReportContent) -> dict[str, np.ndarray]:
    """Probabilities [n, C] by system: "before", "uncalibrated" and "after" where given, and the baselines' names."""
    given = {"before": content.before, "uncalibrated": content.uncalibrated, "after": content.after}
    systems = {name: p for name, p in given.items() if p is not None}
    for name, p in content.baselines.items():
        p = np.asarray(p, dtype=np.float64)
        systems[name] = np.column_stack([1 - p, p]) if p.ndim == 1 else p
    return systems


def score_systems(
    content: ReportContent, systems: Mapping[str, np.ndarray], names: Sequence[str], samples: int, seed: int
) -> Scores:
    """Scores of all systems by the named metrics; without intervals where `samples` is 0."""
    labels, users, sets = content.labels, content.users, content.candidate_sets
    trained = {"before": TRAINED if TRAINED in systems else "after"}
    others = {system: trained.get(system, "after") for system in systems if system != "after"}
    if samples == 0:
        values = {s: compute_metrics(labels, p, users, sets, names) for s, p in systems.items()}
        return Scores(
            {s: {n: _without_range(v) for n, v in by_name.items()} for s, by_name in values.items()},
            {s: {n: _without_range(values[after][n] - v) for n, v in values[s].items()} for s, after in others.items()},
        )
    return Scores(
        {s: intervals(names, labels, p, users, sets, samples=samples, seed=seed) for s, p in systems.items()},
        {
            s: differences(names, labels, systems[s], systems[after], users, sets, samples=samples, seed=seed)
            for s, after in others.items()
        },
    )


def _without_range(value: float) -> Interval:
    return Interval(value, math.nan, math.nan, math.nan, 0)
