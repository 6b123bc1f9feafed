"""The report's two figures: reliability of the probabilities, and the learning curve.

They are drawn with matplotlib's objects and the Agg canvas, without global state, display or window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.evaluation.probability_metrics import ECE_BINS, bin_numbers, calibration_view
from llmrec_peft.evaluation.targets import Targets
from llmrec_peft.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f5fa8", "#d1661c", "#8a8a8a"
INK = "#2b2b2b"


def plot_reliability(path: str | Path, systems: Mapping[str, Targets], what: str) -> Path:
    """Draw one panel a system: stated chance against observed share by bin, and the targets of each bin.

    The bins are those of `ece`. Bars are 95 % Wilson intervals of a bin's share, as if its targets were independent.

    Args:
        systems: name to checked targets (`targets.read_targets`).
        what: the event whose probability is predicted.
    """
    figure = _figure(width=0.6 + 3.7 * len(systems), height=4.9)
    grid = figure.add_gridspec(2, len(systems), height_ratios=[3.2, 1], hspace=0.08, wspace=0.16)
    top = bottom = None
    for column, (name, targets) in enumerate(systems.items()):
        top = figure.add_subplot(grid[0, column], sharey=top)
        bottom = figure.add_subplot(grid[1, column], sharex=top, sharey=bottom)
        _draw_reliability(top, bottom, targets)
        found = compute_metrics(targets.labels, targets.probabilities, names=["ece", "logloss"])
        top.set_title(f"{name}\nece {found['ece']:.3f}, logloss {found['logloss']:.3f}", fontsize=10)
        bottom.set_xlabel(f"stated chance of {_plain_text(what)}")
        for axes in (top, bottom):
            axes.tick_params(labelleft=column == 0)
        top.tick_params(labelbottom=False)
        if column == 0:
            top.set_ylabel("observed share")
            bottom.set_ylabel("targets")
    return _save(figure, path)


def plot_learning_curve(path: str | Path, log_history: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draw training loss and validation metrics by step, from `Trainer.state.log_history`; None if it has neither.

    Left: loss of the training batches and `eval_logloss` (or `eval_loss`). Right, where there is any: `eval_auc`,
    `eval_gauc`.
    """
    train = _series(log_history, "loss")
    loss_key = "eval_logloss" if len(_series(log_history, "eval_logloss")) else "eval_loss"
    losses = _series(log_history, loss_key)
    areas = {key: _series(log_history, f"eval_{key}") for key in ("auc", "gauc")}
    areas = {key: series for key, series in areas.items() if len(series)}
    has_losses = len(train) > 0 or len(losses) > 0
    panels = has_losses + bool(areas)
    if panels == 0:
        return None
    figure = _figure(width=0.4 + 4.3 * panels, height=3.6)
    left = None
    if has_losses:
        left = figure.add_subplot(1, panels, 1)
        _draw_losses(left, train, losses)
    if areas:
        right = figure.add_subplot(1, panels, panels, sharex=left)
        for (key, series), (color, style) in zip(areas.items(), ((ORANGE, "o-"), (GREY, "s--")), strict=False):
            right.plot(*series.T, style, color=color, linewidth=2, markersize=5, label=f"validation {key}")
        _finish_curve(right, "area under the ROC curve")
    figure.tight_layout(w_pad=2)
    return _save(figure, path)


def _draw_losses(axes: Axes, train: np.ndarray, losses: np.ndarray) -> None:
    if len(train):
        axes.plot(*train.T, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(*_smoothed(train).T, color=BLUE, linewidth=2, label="training batches, smoothed")
    if len(losses):
        axes.plot(*losses.T, "o-", color=ORANGE, linewidth=2, markersize=5, label="validation")
    _finish_curve(axes, "loss")


def _draw_reliability(top: Axes, bottom: Axes, targets: Targets) -> None:
    chance, came_true = calibration_view(targets)
    bins = bin_numbers(chance, ECE_BINS)
    size = np.bincount(bins, minlength=ECE_BINS)
    used = np.flatnonzero(size)
    stated = np.bincount(bins, chance, ECE_BINS)[used] / size[used]
    observed = np.bincount(bins, came_true, ECE_BINS)[used] / size[used]
    low, high = _wilson(observed, size[used])
    top.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", zorder=1)
    top.vlines(stated, low, high, color=BLUE, alpha=0.45, linewidth=2, zorder=2)
    top.plot(stated, observed, "o-", color=BLUE, linewidth=1.2, markersize=5, zorder=3)
    top.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    edges = np.linspace(0, 1, ECE_BINS + 1)
    bottom.bar(edges[:-1], size, width=1 / ECE_BINS, align="edge", color=BLUE, alpha=0.55, edgecolor="white")
    _plain(top)
    _plain(bottom)


def _wilson(share: np.ndarray, n: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson (1927) score interval [bins] of shares [bins] of n [bins]; it has a width at shares 0 and 1 too.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return middle - half, middle + half


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """[points, 2] of step and value, in step order; the last of several values of a step counts."""
    points = {entry["step"]: entry[key] for entry in log_history if "step" in entry and _is_number(entry.get(key))}
    return np.array(sorted(points.items()), dtype=np.float64).reshape(-1, 2)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def _smoothed(series: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a tenth of the points, shorter at the ends."""
    # Differences of the running sum give the sums of windows.
    half = len(series) // 20
    total = np.r_[0.0, np.cumsum(series[:, 1])]
    start = np.maximum(np.arange(len(series)) - half, 0)
    stop = np.minimum(np.arange(len(series)) + half + 1, len(series))
    return np.column_stack([series[:, 0], (total[stop] - total[start]) / (stop - start)])


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _finish_curve(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    axes.margins(y=0.15)
    _plain(axes)


def _plain_text(text: str, longest: int = 30) -> str:
    """One short line, with "$" escaped, which matplotlib would read as a formula."""
    text = " ".join(text.split())
    return (text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$")


def _plain(axes: Axes) -> None:
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        # Without the version in the file's metadata, the same numbers give the same bytes.
        figure.savefig(partial, format="png", bbox_inches="tight", metadata={"Software": None})
    return path
