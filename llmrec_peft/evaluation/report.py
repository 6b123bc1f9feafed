"""The report of one run: a Markdown page and its pictures, from answers on the test targets.

`write_report` computes all that it prints, so that a number of the report cannot differ from the answers it is about,
and returns the intervals for a machine to read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmrec_peft.evaluation.bootstrap import Interval, differences, intervals
from llmrec_peft.evaluation.metrics import DEFAULT_NAMES, ECE_BINS, METRICS, compute_metrics, find_metric
from llmrec_peft.evaluation.plots import plot_learning_curve, plot_reliability
from llmrec_peft.evaluation.targets import read_targets
from llmrec_peft.files import write_text

Slices = Mapping[str, Sequence[tuple[str, np.ndarray]]]
TITLES = {"before": "before", "uncalibrated": "after, uncalibrated", "after": "after"}
# Of the same kind as `before`, which no calibration has touched, where the answers are calibrated too.
TRAINED = "uncalibrated"
SLICE_METRICS = ("auc", "gauc", "logloss", "ece", "po_ratio")


@dataclass(frozen=True)
class ReportContent:
    """What a report is made of. n test targets, C classes.

    Mappings of facts (`run`, `data`, `cost`) are printed as given: name to number or text. A fact of `data` that is a
    mapping itself becomes a column of a table, such as {"train": {"targets": 4503, "users": 300}, "test": {...}}.
    """

    title: str
    class_names: Sequence[str]
    labels: np.ndarray  # int [n]
    users: np.ndarray  # ids [n]
    after: np.ndarray  # [n, C] the trained model's answers; calibrated, if `uncalibrated` is given too
    before: np.ndarray | None = None  # [n, C] the untrained model's
    uncalibrated: np.ndarray | None = None  # [n, C] the trained model's before calibration
    baselines: Mapping[str, np.ndarray] = field(default_factory=dict)  # name to [n, C], or [n] of the last of 2 classes
    split_by: str = "time"  # how the log was split: "time" or "user"
    lists: np.ndarray | None = None  # ids [n]
    slices: Slices = field(default_factory=dict)  # heading to (name, mask [n]) pairs, see `count_slices`
    log_history: Sequence[Mapping] = ()  # Trainer.state.log_history
    run: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)


def write_report(
    directory: str | Path,
    content: ReportContent,
    *,
    names: Sequence[str] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Write report.md, reliability.png and, where the history has any points, learning_curve.png into `directory`.

    names: the metrics, by default all that have a direction or a right value. samples: of the bootstrap by user; 0 for
    no intervals. Returns plain mappings: {"intervals": {system: {metric: interval}}, "differences": {system: {metric:
    interval of after - system}}}, where the systems are "before", "after", "uncalibrated" and the baselines' names. The
    difference to "before" is that of the uncalibrated answers, where both are given: it is training's alone.
    Raises DataError for answers that do not fit together, ConfigError for a metric that does not exist.
    """
    directory = Path(directory)
    names = _value_names(names)
    systems = _systems(content)
    found = _score(content, systems, names, samples, seed)
    targets = {
        title: read_targets(content.labels, systems[name], content.users)
        for name, title in TITLES.items()
        if name in systems
    }
    directory.mkdir(parents=True, exist_ok=True)
    what = content.class_names[-1] if len(content.class_names) == 2 else "the top class"
    plot_reliability(directory / "reliability.png", targets, what)
    curve = plot_learning_curve(directory / "learning_curve.png", content.log_history)
    write_text("\n\n".join(_sections(content, systems, found, names, curve, samples)) + "\n", directory / "report.md")
    return {
        part: {system: {name: i.to_dict() for name, i in by_name.items()} for system, by_name in by_system.items()}
        for part, by_system in found.items()
    }


def count_slices(counts: np.ndarray, edges: Sequence[int], unit: str) -> list[tuple[str, np.ndarray]]:
    """Slices of targets by a count [n]: below edges[0], then from each edge to the next, and from the last up.

    count_slices(history, [1, 5, 20], "earlier events") gives "0 earlier events", "1 to 4 ...", "5 to 19 ...",
    "20 or more ...". Empty slices are left out.
    """
    counts = np.asarray(counts)
    bounds = [0, *edges]
    found = []
    for low, high in zip(bounds, [*edges, None], strict=True):
        mask = (counts >= low) if high is None else (counts >= low) & (counts < high)
        text = f"{low:,} or more" if high is None else f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        if mask.any():
            found.append((f"{text} {unit}", mask))
    return found


def _value_names(names: Sequence[str] | None) -> list[str]:
    wanted = DEFAULT_NAMES if names is None else names
    return [name for name in wanted if not find_metric(name)[0].count]


def _systems(content: ReportContent) -> dict[str, np.ndarray]:
    systems = {"before": content.before, "uncalibrated": content.uncalibrated, "after": content.after}
    systems = {name: p for name, p in systems.items() if p is not None}
    for name, p in content.baselines.items():
        p = np.asarray(p, dtype=np.float64)
        systems[name] = np.column_stack([1 - p, p]) if p.ndim == 1 else p
    return systems


def _score(
    content: ReportContent, systems: Mapping[str, np.ndarray], names: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, dict[str, Interval]]]:
    arrays = (content.users, content.lists)
    trained = {"before": TRAINED if TRAINED in systems else "after"}
    others = {system: trained.get(system, "after") for system in systems if system != "after"}
    if samples == 0:
        values = {s: compute_metrics(content.labels, p, *arrays, names) for s, p in systems.items()}
        bare = {s: {n: _bare(v) for n, v in by_name.items()} for s, by_name in values.items()}
        gaps = {s: {n: _bare(values[after][n] - v) for n, v in values[s].items()} for s, after in others.items()}
        return {"intervals": bare, "differences": gaps}
    options = {"samples": samples, "seed": seed}
    return {
        "intervals": {s: intervals(names, content.labels, p, *arrays, **options) for s, p in systems.items()},
        "differences": {
            s: differences(names, content.labels, systems[s], systems[after], *arrays, **options)
            for s, after in others.items()
        },
    }


def _bare(value: float) -> Interval:
    return Interval(value, math.nan, math.nan, math.nan, 0)


# ---- page -------------------------------------------------------------------------------------------------------


def _sections(content, systems, found, names, curve: Path | None, samples: int) -> list[str]:
    parts = [f"# {_cell(content.title)}", _summary(content, found, names, samples)]
    if content.run:
        parts += [_facts(content.run)]
    parts += ["## Before and after, on test" if "before" in systems else "## On test", _main_table(found, names)]
    if content.baselines:
        parts += ["## Beside counting", _baseline_text(content.split_by), _baseline_table(content, found, names)]
    parts += ["## By class", _class_text(content), "```\n" + _classification(content) + "\n```"]
    for heading, slices in content.slices.items():
        parts += [f"## By {_cell(heading)}", _slice_table(content, slices)]
    parts += ["## Reliability", "![stated chance against observed share](reliability.png)"]
    if curve is not None:
        parts += ["## Learning curve", "![loss and validation metrics by step](learning_curve.png)"]
    if content.data:
        parts += ["## Data", _data_table(content.data)]
    if content.cost:
        parts += ["## Cost", _facts(content.cost)]
    return [*parts, "## How to read the numbers", _legend(names, samples, systems)]


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


def _gap_title(systems) -> str:
    return "uncalibrated after - before" if TRAINED in systems else "after - before"


def _summary(content, found, names: Sequence[str], samples: int) -> str:
    users = len(np.unique(np.asarray(content.users)))
    head = names[0]
    after = found["intervals"]["after"][head]
    text = f"{len(content.labels):,} test targets of {users:,} users: {head} {_number(after.value)}{_range(after)}"
    if "before" in found["differences"]:
        gap = found["differences"]["before"][head]
        text += f", {_gap_title(found['intervals'])} {_number(gap.value, sign=True)}{_range(gap, sign=True)}"
    best = _best_baseline(content, found, head)
    if best:
        gap = found["differences"][best][head]
        text += (
            f"; after - {_words(best)}, the best of counting, {_number(gap.value, sign=True)}{_range(gap, sign=True)}"
        )
    return text + "."


def _best_baseline(content, found, name: str) -> str | None:
    sign = 1 if find_metric(name)[0].higher else -1
    values = {s: sign * found["intervals"][s][name].value for s in content.baselines}
    values = {s: value for s, value in values.items() if not math.isnan(value)}
    return max(values, key=values.get) if values and find_metric(name)[0].higher is not None else None


def _main_table(found, names: Sequence[str]) -> str:
    shown = [s for s in TITLES if s in found["intervals"]]
    gap = "before" in found["differences"]
    rows = []
    for name in names:
        cells = [_with_range(found["intervals"][s][name]) for s in shown]
        if gap:
            cells.append(_with_range(found["differences"]["before"][name], sign=True))
        rows.append([name, _direction(name), *cells])
    return _table(["metric", "better", *(TITLES[s] for s in shown), *([_gap_title(shown)] if gap else [])], rows)


def _baseline_table(content, found, names: Sequence[str]) -> str:
    systems = [*content.baselines, "after"]
    rows = [[name, _direction(name), *(_with_range(found["intervals"][s][name]) for s in systems)] for name in names]
    for name in (n for n in ("auc", "logloss") if n in names):
        gaps = [_with_range(found["differences"][s][name], sign=True) for s in content.baselines]
        rows.append([f"{name}: after minus this", _direction(name), *gaps, ""])
    return _table(["metric", "better", *(_words(s) for s in systems)], rows)


def _class_text(content) -> str:
    if len(content.class_names) == 2:
        return f"Taken as {_cell(content.class_names[1])} where its probability is over one half."
    return "Each target is given its most probable class."


def _classification(content) -> str:
    from sklearn.metrics import classification_report

    return classification_report(
        content.labels,
        np.asarray(content.after).argmax(axis=1),
        labels=range(len(content.class_names)),
        target_names=[" ".join(str(name).split()).replace("`", "'") for name in content.class_names],
        digits=3,
        zero_division=0,
    ).rstrip()


def _slice_table(content, slices: Sequence[tuple[str, np.ndarray]]) -> str:
    rows = []
    labels, users, after = (np.asarray(a) for a in (content.labels, content.users, content.after))
    last = len(content.class_names) - 1
    for name, mask in slices:
        mask = np.asarray(mask, dtype=bool)
        if not mask.any():
            continue
        values = compute_metrics(labels[mask], after[mask], users[mask], names=["targets", "users", *SLICE_METRICS])
        share = float((labels[mask] == last).mean())
        rows.append([_cell(name), *(f"{values[n]:,}" for n in ("targets", "users")), _number(share)])
        rows[-1] += [_number(values[n]) for n in SLICE_METRICS]
    return _table(["slice", "targets", "users", f"share of {_cell(content.class_names[-1])}", *SLICE_METRICS], rows)


def _data_table(data: Mapping[str, Any]) -> str:
    columns = {name: value for name, value in data.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in data.items() if name not in columns}
    parts = [_facts(plain)] if plain else []
    if columns:
        keys = list(dict.fromkeys(key for column in columns.values() for key in column))
        rows = [[_cell(key), *(_fact(column.get(key, "")) for column in columns.values())] for key in keys]
        parts.append(_table(["", *map(_cell, columns)], rows))
    return "\n\n".join(parts)


def _legend(names: Sequence[str], samples: int, systems: Mapping[str, np.ndarray]) -> str:
    lines = [f"- {name}: {METRICS[name.partition('@')[0]].summary}." for name in names]
    if TRAINED in systems:
        lines.append(
            f"- after: calibrated with what was fitted on validation. {TITLES[TRAINED]}: without, as before is too"
            + (f"; '{_gap_title(systems)}' is thus the effect of training alone." if "before" in systems else ".")
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


# ---- text -------------------------------------------------------------------------------------------------------


def _direction(name: str) -> str:
    return {True: "higher", False: "lower", None: "1" if name == "po_ratio" else ""}[find_metric(name)[0].higher]


def _number(value: float, sign: bool = False) -> str:
    if math.isnan(value):
        return "undefined"
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def _range(found: Interval, sign: bool = False) -> str:
    if math.isnan(found.low):
        return ""
    return f" [{_number(found.low, sign)}, {_number(found.high, sign)}]"


def _with_range(found: Interval, sign: bool = False) -> str:
    return _number(found.value, sign) + _range(found, sign)


def _facts(facts: Mapping[str, Any]) -> str:
    return _table(["", ""], [[_cell(name), _fact(value)] for name, value in facts.items()])


def _fact(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)) or value is None:
        return {True: "yes", False: "no", None: "none"}[None if value is None else bool(value)]
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return _cell(value)


def _cell(value: Any) -> str:
    """Text of a table cell or heading: on one line, with what Markdown would read as syntax escaped."""
    text = " ".join(str(value).split())
    for sign in "\\|`<*":
        text = text.replace(sign, "\\" + sign)
    return text


def _words(name: str) -> str:
    return _cell(name.replace("_", " "))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + " --- |" * len(head))
    return "\n".join(lines)
