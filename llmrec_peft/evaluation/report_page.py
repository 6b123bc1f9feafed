"""The Markdown page of the report, section by section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmrec_peft.evaluation.metrics import METRICS, compute_metrics, find_metric
from llmrec_peft.evaluation.probability_metrics import ECE_BINS
from llmrec_peft.evaluation.report_content import ReportContent
from llmrec_peft.evaluation.report_markdown import (
    cell,
    interval_range,
    key_value_table,
    number,
    number_with_range,
    table,
    value_cell,
    words,
)
from llmrec_peft.evaluation.report_scores import TRAINED, Scores

TITLES = {"before": "before", "uncalibrated": "after, uncalibrated", "after": "after"}
"""Headings of the systems that are not baselines."""
SLICE_METRICS = ("auc", "gauc", "logloss", "ece", "po_ratio")


def page(content: ReportContent, scores: Scores, names: Sequence[str], *, has_curve: bool, samples: int) -> str:
    """The whole page; names: the metrics that it shows. samples: number of bootstrap samples."""
    before = "before" in scores.intervals
    parts = [f"# {cell(content.title)}", _summary(content, scores, names)]
    if content.run:
        parts += [key_value_table(content.run)]
    parts += ["## Before and after, on test" if before else "## On test", _main_table(scores, names)]
    if content.baselines:
        parts += ["## Counting baselines", _baseline_text(content.split_by), _baseline_table(content, scores, names)]
    parts += ["## By class", _class_text(content), "```\n" + _classification(content) + "\n```"]
    for heading, slices in content.slices.items():
        parts += [f"## By {cell(heading)}", _slice_table(content, slices)]
    parts += ["## Reliability", "![stated chance against observed share](reliability.png)"]
    if has_curve:
        parts += ["## Learning curve", "![loss and validation metrics by step](learning_curve.png)"]
    if content.data:
        parts += ["## Data", _data_table(content.data)]
    if content.cost:
        parts += ["## Cost", key_value_table(content.cost)]
    return "\n\n".join([*parts, "## How to read the numbers", _legend(names, samples, scores)]) + "\n"


def _baseline_text(split_by: str) -> str:
    counted = {
        "time": "rates of the item and of the user counted over strictly earlier rows",
        "user": "the item's rate counted over the training rows of other users, at any time, the user's rate over the "
        "user's own strictly earlier rows",
    }[split_by]
    return (
        f"Same targets, no text read: {counted}, and a logistic regression on both rates and their counts, fitted on "
        "the training rows."
    )


def _difference_title(scores: Scores) -> str:
    return "uncalibrated after - before" if TRAINED in scores.intervals else "after - before"


def _summary(content: ReportContent, scores: Scores, names: Sequence[str]) -> str:
    users = len(np.unique(np.asarray(content.users)))
    head = names[0]
    after = scores.intervals["after"][head]
    text = (
        f"{len(content.labels):,} test targets of {users:,} users: {head} {number(after.value)}{interval_range(after)}"
    )
    if "before" in scores.differences:
        gap = scores.differences["before"][head]
        text += f", {_difference_title(scores)} {number(gap.value, sign=True)}{interval_range(gap, sign=True)}"
    best = _best_baseline(content, scores, head)
    if best:
        gap = scores.differences[best][head]
        text += f"; after - {words(best)}, the best counting baseline, {number_with_range(gap, sign=True)}"
    return text + "."


def _best_baseline(content: ReportContent, scores: Scores, name: str) -> str | None:
    sign = 1 if find_metric(name)[0].higher else -1
    values = {s: sign * scores.intervals[s][name].value for s in content.baselines}
    values = {s: value for s, value in values.items() if not math.isnan(value)}
    return max(values, key=values.__getitem__) if values and find_metric(name)[0].higher is not None else None


def _main_table(scores: Scores, names: Sequence[str]) -> str:
    shown = [s for s in TITLES if s in scores.intervals]
    gap = "before" in scores.differences
    rows = []
    for name in names:
        cells = [number_with_range(scores.intervals[s][name]) for s in shown]
        if gap:
            cells.append(number_with_range(scores.differences["before"][name], sign=True))
        rows.append([name, _direction(name), *cells])
    return table(["metric", "better", *(TITLES[s] for s in shown), *([_difference_title(scores)] if gap else [])], rows)


def _baseline_table(content: ReportContent, scores: Scores, names: Sequence[str]) -> str:
    systems = [*content.baselines, "after"]
    rows = [
        [name, _direction(name), *(number_with_range(scores.intervals[s][name]) for s in systems)] for name in names
    ]
    for name in (n for n in ("auc", "logloss") if n in names):
        gaps = [number_with_range(scores.differences[s][name], sign=True) for s in content.baselines]
        rows.append([f"{name}: after minus this", _direction(name), *gaps, ""])
    return table(["metric", "better", *(words(s) for s in systems)], rows)


def _class_text(content: ReportContent) -> str:
    if len(content.class_names) == 2:
        return f"Predicted as {cell(content.class_names[1])} where its probability is over one half."
    return "Each target is predicted as its most probable class."


def _classification(content: ReportContent) -> str:
    from sklearn.metrics import classification_report

    return classification_report(
        content.labels,
        np.asarray(content.after).argmax(axis=1),
        labels=range(len(content.class_names)),
        target_names=[" ".join(str(name).split()).replace("`", "'") for name in content.class_names],
        digits=3,
        zero_division=0,
    ).rstrip()


def _slice_table(content: ReportContent, slices: Sequence[tuple[str, np.ndarray]]) -> str:
    rows = []
    labels, users, after = (np.asarray(a) for a in (content.labels, content.users, content.after))
    last = len(content.class_names) - 1
    for name, mask in slices:
        mask = np.asarray(mask, dtype=bool)
        if not mask.any():
            continue
        values = compute_metrics(labels[mask], after[mask], users[mask], names=["targets", "users", *SLICE_METRICS])
        share = float((labels[mask] == last).mean())
        rows.append([cell(name), *(f"{values[n]:,}" for n in ("targets", "users")), number(share)])
        rows[-1] += [number(values[n]) for n in SLICE_METRICS]
    return table(["slice", "targets", "users", f"share of {cell(content.class_names[-1])}", *SLICE_METRICS], rows)


def _data_table(data: Mapping[str, Any]) -> str:
    columns = {name: value for name, value in data.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in data.items() if name not in columns}
    parts = [key_value_table(plain)] if plain else []
    if columns:
        keys = list(dict.fromkeys(key for column in columns.values() for key in column))
        rows = [[cell(key), *(value_cell(column.get(key, "")) for column in columns.values())] for key in keys]
        parts.append(table(["", *map(cell, columns)], rows))
    return "\n\n".join(parts)


def _legend(names: Sequence[str], samples: int, scores: Scores) -> str:
    lines = [f"- {name}: {METRICS[name.partition('@')[0]].summary}." for name in names]
    if TRAINED in scores.intervals:
        lines.append(
            f"- after: calibrated with what was fitted on validation. {TITLES[TRAINED]}: without, as before is too"
            + (
                f"; '{_difference_title(scores)}' is thus the effect of training alone."
                if "before" in scores.intervals
                else "."
            )
        )
    if samples:
        lines.append(
            f"- In brackets: 95 % percentile interval of {samples:,} bootstrap samples that draw whole users; "
            "differences are paired on the same samples. Resampling adds noise to each bin, so the interval of ece "
            "lies somewhat high."
        )
    lines.append(
        f"- Reliability: {ECE_BINS} bins of equal width; bars are 95 % Wilson intervals of a bin's share, as if its "
        "targets were independent."
    )
    return "\n".join(lines)


def _direction(name: str) -> str:
    return {True: "higher", False: "lower", None: "1" if name == "po_ratio" else ""}[find_metric(name)[0].higher]
