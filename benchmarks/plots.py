"""Plots of result files, each beside its file: `python -m benchmarks.plots benchmarks/results/peers.json ...`."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter


@contextmanager
def figure(path: Path, size: tuple[float, float], *layout: int, **options) -> Iterator:
    """Axes of a new figure, which is saved at the end."""
    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(*layout, **options)
    yield axes
    for one in made.axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    made.savefig(path, dpi=130)


def ends(values: list[dict], middle: str, low: str, high: str) -> list[list[float]]:
    """Lengths of error bars, [2, n]."""
    return [[v[middle] - v[low] for v in values], [v[high] - v[middle] for v in values]]


def cost_curve(curve: dict, path: Path) -> None:
    """A curve with both floors, and the peak memory below it; axes are logarithmic where values span a factor of 8."""
    points = sorted(curve["points"], key=lambda point: point["x"])
    xs = [point["x"] for point in points]
    lines = {"floor_per_s": ("--", "#8a8a8a", "what products with weights alone would allow"),
             "floor_with_attention_per_s": (":", "#3b8a4f", "the same with attention's products"),
             "per_s": ("o-", "#1f5fa8", "measured"), "peak_mib": ("o-", "#d1661c", None)}  # fmt: skip
    with figure(path, (7, 5.6), 2, 1, sharex=True, height_ratios=[2, 1]) as (above, below):
        shown = []
        for key, (style, colour, label) in lines.items():
            known = [(x, point[key]) for x, point in zip(xs, points, strict=True) if point[key] is not None]
            values = [value for _, value in known]
            bars = ends(values, "median", "min", "max") if style == "o-" and known else None
            axes, middle = (below if key == "peak_mib" else above), [value["median"] for value in values]
            axes.errorbar([x for x, _ in known], middle, bars, fmt=style, ms=4, capsize=3, color=colour, label=label)
            shown += middle if axes is above else []
        above.set_ylim(bottom=0)
        if max(shown) >= 8 * min(shown):
            above.set_yscale("log")
            above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            above.yaxis.set_major_formatter(ScalarFormatter())
        below.set_ylim(bottom=0)
        if min(xs) > 0 and max(xs) >= 8 * min(xs):
            below.set_xscale("log")
        below.xaxis.set_major_locator(FixedLocator(xs))
        below.xaxis.set_major_formatter(ScalarFormatter())
        below.xaxis.set_minor_locator(NullLocator())
        above.yaxis.set_minor_formatter(NullFormatter())
        above.set_ylabel(f"{curve['unit']}/s")
        below.set(ylabel="peak memory, MiB", xlabel=curve["along"])
        above.legend(frameon=False, fontsize=9)


def cost_curves(result: dict, path: Path) -> None:
    """A file a curve."""
    for name, curve in result["curves"].items():
        cost_curve(curve, path.with_name(f"cost_{name}.png"))


def peers(result: dict, path: Path) -> None:
    """Validation AUC against training seconds, one line a system, with the interval of its last point."""
    colours = {"streams": "#1f5fa8", "plain": "#d1661c", "instruction": "#3b8a4f", "swift": "#7d4ea8"}
    with figure(path, (7, 4.2)) as axes:
        for name, entry in reversed(result["systems"].items()):
            curve, end = entry["curve"], entry["curve"][-1]
            axes.plot([p["seconds"] for p in curve], [p["auc"] for p in curve], "o-", ms=4, color=colours[name],
                      label=f"{name} ({entry['targets_per_s']:.2g} targets/s)")  # fmt: skip
            if end["auc_interval"]:
                low, high = end["auc_interval"]
                axes.errorbar(end["seconds"], end["auc"], [[end["auc"] - low], [high - end["auc"]]], capsize=3,
                              color=colours[name], alpha=0.6)  # fmt: skip
        axes.axhline(result["compared_at"]["auc"], color="#8a8a8a", lw=0.8, ls=":")
        axes.set_xlabel("seconds of training (set-up and evaluation left out)")
        axes.set_ylabel(f"AUC on {result['validation']['targets']} validation targets")
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def students(result: dict, path: Path) -> None:
    """AUC and GAUC over the median latency."""
    with figure(path, (9, 3.6), 1, 2) as both:
        for axes, metric in zip(both, ("auc", "gauc"), strict=True):
            for name, system in result["systems"].items():
                if "latency_ms" in system:
                    value = system["quality"][metric]
                    axes.errorbar(system["latency_ms"]["p50"], value["value"], ends([value], "value", "low", "high"),
                                  fmt="o", capsize=3, label=name)  # fmt: skip
            axes.set(xscale="log", xlabel="ms for 50 candidates, one core (median)", ylabel=metric.upper())
        both[0].legend(fontsize=8, loc="lower center")


def draw(path: Path) -> None:
    """The plots of one result file."""
    result = json.loads(path.read_text(encoding="utf-8"))
    {"cost_curves": cost_curves, "peers": peers, "students": students}[path.stem](result, path.with_suffix(".png"))


if __name__ == "__main__":
    for word in sys.argv[1:]:
        draw(Path(word))
