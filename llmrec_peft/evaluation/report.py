"""The report of one run: a Markdown page and its figures, from predictions on the test targets.

`write_report` computes all numbers that it prints, so the report cannot differ from the predictions that it
describes, and returns the intervals for a program to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrec_peft.evaluation.metrics import DEFAULT_NAMES, find_metric
from llmrec_peft.evaluation.plots import plot_learning_curve, plot_reliability
from llmrec_peft.evaluation.report_content import ReportContent
from llmrec_peft.evaluation.report_page import TITLES, page
from llmrec_peft.evaluation.report_scores import score_systems, systems_of
from llmrec_peft.evaluation.targets import read_targets
from llmrec_peft.files import write_text


def write_report(
    directory: str | Path,
    content: ReportContent,
    *,
    names: Sequence[str] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Write report.md, reliability.png and, where the history has any points, learning_curve.png into `directory`.

    Args:
        names: the metrics; by default all that have a direction or a right value.
        samples: number of bootstrap samples of users; 0 for no intervals.
        seed: random seed of the bootstrap.

    Returns plain mappings: {"intervals": {system: {metric: interval}}, "differences": {system: {metric: interval of
    after - system}}}, where the systems are "before", "after", "uncalibrated" and the baselines' names. The difference
    to "before" is that of the uncalibrated predictions, where both are given: it is the effect of training alone.

    Raises DataError for predictions that do not fit together, ConfigError for a metric that does not exist.
    """
    directory = Path(directory)
    names = [name for name in (DEFAULT_NAMES if names is None else names) if not find_metric(name)[0].count]
    systems = systems_of(content)
    scores = score_systems(content, systems, names, samples, seed)
    targets = {
        title: read_targets(content.labels, systems[name], content.users)
        for name, title in TITLES.items()
        if name in systems
    }
    directory.mkdir(parents=True, exist_ok=True)
    what = content.class_names[-1] if len(content.class_names) == 2 else "the top class"
    plot_reliability(directory / "reliability.png", targets, what)
    curve = plot_learning_curve(directory / "learning_curve.png", content.log_history)
    write_text(page(content, scores, names, has_curve=curve is not None, samples=samples), directory / "report.md")
    return scores.to_dict()
