"""What a target costs, by what it depends on: five curves of targets/s and peak memory, beside the arithmetic's floor.

    python benchmarks/cost_curves.py --data DIR [--rounds 3] [--curves context rank]

The curves: history events before the targets, events answered in a window, candidates of one history (scoring with
nothing kept, so that each is a new history), rank of LoRA, and layers of the base (the first so many). Where a curve
does not say otherwise, a window is the domain's (or `--window`'s), LoRA has rank 16 on all linear layers, and the base
is whole. Sampled negatives are targets too, so that a window of 10 events may hold more than 10 targets.

Every round runs all points once and measures torch.mm before each curve. A training point is one optimizer step on as
many windows as reach `--step-tokens`, at the recipe's tokens a micro-batch, and nothing but such windows as have
exactly the history and the events that the point asks for. The windows of a round are the same for all points of a
curve, as far as they have the same first target: the context's curve keeps to windows that every point can use.

The floor is the time that the operations alone would take at the rate of torch.mm; the curves show the targets/s (for
scoring the candidates/s) that it leaves:

    floor = targets * rate / (tokens * operations a token)
    floor with attention = targets * rate / (tokens * operations a token + attention)

Operations a token are 4 N + 6 A in training (train_speed.flops_per_token) and 2 N in scoring, where the adapter lies in
the weights; tokens are those of the windows, or of the history once and of each candidate, without padding. Attention
is its own two products over the pairs that the mask allows, 4 d a pair and layer forward and twice that backward, d
being heads times a head's size (measuring.attention_flops). Both count the last layer whole, though the package runs
most of it at the answers alone, so that with few layers the shares are too high: by up to one part in the number of
layers.

Memory is the peak of the whole process, started anew before each point (measuring.reset_peak); no other classifier is
in memory then. `rest_mib` is what was resident before the point.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from bank import make_bundle
from measuring import (
    attention_of,
    cell,
    header,
    matmul_rate,
    memory_mib,
    quiet,
    release_memory,
    reset_peak,
    spread,
    stop,
    write_result,
)
from memory import warm_up
from peers.streams import read_domain
from score_speed import pick
from train_speed import CONFIG, StreamSide, flops_per_token, read_log

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.distillation.shallow_student import write_shallow_student
from llmrec_peft.errors import LLMRecError
from llmrec_peft.models.base import check_positions, load_config, load_tokenizer, resolve_base
from llmrec_peft.models.classifier import load_classifier
from llmrec_peft.runs.split_streams import split_by_domain, streams_for_split
from llmrec_peft.scoring.scorer import Scorer

ROOT = Path(__file__).resolve().parent
CURVES = {
    "context": ("history events before the targets", "targets"),
    "targets": ("events answered in a window", "targets"),
    "candidates": ("candidates scored on one history", "candidates"),
    "rank": ("rank of LoRA", "targets"),
    "layers": ("layers of the base", "targets"),
}
"""What each curve goes along, and what is counted a second. Its points are the option of the same name."""
RANK = 16
LEAST = {"context": 0, "targets": 1, "candidates": 1, "rank": 1, "layers": 1}


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a training curve: its place, the base, the rank, and the windows to draw from (numbers [n])."""

    x: int
    base: str
    rank: int
    streams: StreamDataset
    windows: np.ndarray


# -- counting --------------------------------------------------------------------------------------


def floors(entry: dict) -> dict[str, float]:
    """Targets/s (or candidates/s) at the floor and at that with attention, and the measured shares of them.

    entry: count, tokens, flops_per_token, attention_flops, matmul_flops_per_s and per_s.
    """
    plain = entry["tokens"] * entry["flops_per_token"]
    work = entry["count"] * entry["matmul_flops_per_s"]
    floor, both = work / plain, work / (plain + entry["attention_flops"])
    return {
        "floor_per_s": floor,
        "floor_with_attention_per_s": both,
        "share": entry["per_s"] / floor,
        "share_with_attention": entry["per_s"] / both,
    }


# -- windows ---------------------------------------------------------------------------------------


def fitting(streams: StreamDataset, context: int, targets: int) -> np.ndarray:
    """Numbers of the windows that have exactly so many history events and events to answer; ends the run if none."""
    found = np.flatnonzero((streams.history_sizes == context) & (np.diff(streams.target_offsets) == targets))
    if not len(found):
        stop(f"no training window has {context} history events and {targets} to answer; ask for fewer")
    return found


def first_rows(streams: StreamDataset, windows: np.ndarray) -> np.ndarray:
    """The log's row of each window's first target."""
    return streams.target_rows[streams.target_offsets[windows]]


def draw(point: Point, tokens: int, priority: np.ndarray) -> StreamSubset:
    """Windows of a point, in the order of `priority` [rows of the log] at their first targets, until they hold so many
    tokens."""
    order = point.windows[np.argsort(priority[first_rows(point.streams, point.windows)], kind="stable")]
    count = int(np.searchsorted(np.cumsum(point.streams.lengths[order]), tokens)) + 1
    return StreamSubset(point.streams, np.sort(order[:count]))


# -- points ----------------------------------------------------------------------------------------


def check(options: argparse.Namespace, log: BehaviorLog, depth: int) -> None:
    """End the run with one line if an option asks for what cannot be."""
    for name, least in (("rounds", 1), ("step_tokens", 1), ("micro_tokens", 1), ("tokens", 1)):
        if getattr(options, name) < least:
            stop(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if options.window[0] < 0 or options.window[1] < 1:
        stop(f"--window must be a context from 0 and targets from 1, got {options.window[0]} {options.window[1]}")
    most = {"candidates": log.num_items, "layers": depth}
    whose = {"candidates": "items the log has", "layers": "layers the base has"}
    for name in options.curves:
        for x in getattr(options, name):
            if x < LEAST[name]:
                stop(f"--{name} must be at least {LEAST[name]}, got {x}")
            if x > most.get(name, x):
                stop(f"--{name} must be at most {most[name]}, the {whose[name]}, got {x}")


def lay_out(options: argparse.Namespace, log: BehaviorLog, domain: Domain, base: str, scratch: Path) -> dict:
    """The points of the training curves; bases of fewer layers are written to `scratch`."""
    splits, tokenizer = split_by_domain(log, domain), load_tokenizer(base)

    @functools.cache
    def streams(context: int, targets: int) -> StreamDataset:
        other = read_domain(options.domain, context, targets)
        rule = dataclasses.replace(other.stream, max_length=options.max_length)
        return streams_for_split(splits, "train", dataclasses.replace(other, stream=rule), tokenizer)

    def point(x: int, context: int, targets: int, rank: int = RANK, place: str = base) -> Point:
        found = streams(context, targets)
        return Point(x, place, rank, found, fitting(found, context, targets))

    context, targets = options.window
    made = {
        "context": lambda x: point(x, x, targets),
        "targets": lambda x: point(x, context, x),
        "rank": lambda x: point(x, context, targets, rank=x),
        "layers": lambda x: point(x, context, targets, place=first_layers(base, domain, x, scratch)),
    }
    points = {name: [made[name](x) for x in getattr(options, name)] for name in options.curves if name in made}
    if "context" in points:
        rows = [first_rows(one.streams, one.windows) for one in points["context"]]
        shared = functools.reduce(np.intersect1d, rows)
        if not len(shared):
            stop("no targets have all of the histories of --context; ask for fewer events")
        points["context"] = [
            dataclasses.replace(one, windows=one.windows[np.isin(own, shared)])
            for one, own in zip(points["context"], rows, strict=True)
        ]
    return points


def first_layers(base: str, domain: Domain, layers: int, scratch: Path) -> str:
    """The base with its first `layers` layers alone, as a directory; the base itself where these are all."""
    if layers == load_config(base).get_text_config().num_hidden_layers:
        return base
    directory = scratch / f"layers-{layers}"
    write_shallow_student(load_classifier(base, domain, "head"), list(range(layers)), directory)
    return str(directory)


# -- measuring -------------------------------------------------------------------------------------


class Sides:
    """The classifier that trains: one at a time, so that no point's memory holds another's."""

    def __init__(self, options: argparse.Namespace, domain: Domain, scratch: Path):
        self.options, self.domain, self.scratch = options, domain, str(scratch)
        self._key: tuple | None = None
        self._side: StreamSide | None = None

    def get(self, base: str, rank: int) -> StreamSide:
        """LoRA of this rank on this base, warmed up by a step on 64 tokens."""
        if self._key != (base, rank):
            self.drop()
            torch.manual_seed(self.options.seed)
            classifier = load_classifier(base, self.domain, "lora", r=rank, alpha=2 * rank)
            warm_up(classifier)
            self._side, self._key = StreamSide(classifier, self.options, self.scratch), (base, rank)
        return self._side

    def drop(self) -> None:
        """Free the classifier."""
        self._side = self._key = None
        release_memory()


def train(side: StreamSide, windows: StreamSubset) -> dict:
    """One step on these windows: what it took, and what had to be computed."""
    release_memory()
    rest, config = memory_mib("VmRSS"), side.classifier.config
    found = side.train(windows, 1)
    streams = (windows[number] for number in range(len(windows)))
    return {
        "count": found["targets"],
        "tokens": found["tokens"],
        "flops_per_token": flops_per_token(side.classifier)["flops_per_token"],
        "attention_flops": sum(attention_of(one.position_ids, config, training=True) for one in streams),
        "seconds": found["seconds"],
        "per_s": found["targets_per_s"],
        "peak_mib": found["peak_rss_mib"],
        "rest_mib": rest,
    }


def score(scorer: Scorer, history: list, candidates: list) -> dict:
    """Answers for these candidates, the history encoded anew: what they took, and what had to be computed."""
    prefix = scorer.prompts.prefix(history)
    size = len(prefix.header) + sum(map(len, prefix.events))
    # Candidates with the same words are answered once.
    probes = {probe.tobytes(): len(probe) for probe in scorer.prompts.events(candidates, "candidates")}
    positions = np.concatenate([np.arange(size), *(size + np.arange(length) for length in probes.values())])
    classifier = scorer._engine.classifier
    release_memory()
    rest = memory_mib("VmRSS")
    reset_peak()
    start = time.perf_counter()
    scorer.score(history, candidates)
    seconds = time.perf_counter() - start
    return {
        "count": len(candidates),
        "tokens": len(positions),
        "flops_per_token": 2 * flops_per_token(classifier)["base_parameters"],
        "attention_flops": attention_of(positions, classifier.config, training=False),
        "seconds": seconds,
        "per_s": len(candidates) / seconds,
        "peak_mib": memory_mib(),
        "rest_mib": rest,
    }


def load_scoring(options: argparse.Namespace, log: BehaviorLog, domain: Domain, bundle: Path) -> tuple:
    """A scorer that keeps nothing, a history, and as many candidates as the last point asks for."""
    scorer = Scorer.load(bundle, log, cache_bytes=0)
    asked = argparse.Namespace(tokens=options.tokens, candidates=max(options.candidates), seed=options.seed)
    history, candidates = pick(log, domain, scorer, asked)
    scorer.score(history[:1], candidates[:1])  # warms up
    return scorer, history, candidates


def run(options: argparse.Namespace, scratch: Path) -> dict:
    """All rounds, and what they come to."""
    log, domain, base = read_log(options.data), Domain.from_yaml(options.domain), resolve_base(options.base)
    options.window = options.window or [domain.stream.context, domain.stream.targets]
    config = load_config(base)
    check(options, log, config.get_text_config().num_hidden_layers)
    check_positions(config, options.max_length)
    points = lay_out(options, log, domain, base, scratch)
    if "candidates" in options.curves:
        bundle = make_bundle(scratch / "bundle", base, domain, options.seed)
    sides = Sides(options, domain, scratch)
    rounds = {name: {x: [] for x in getattr(options, name)} for name in options.curves}
    for number in range(options.rounds):
        priority = np.random.default_rng([options.seed, number]).random(len(log))
        for name in options.curves:
            sides.drop()
            rate = max(matmul_rate(options.matmul_sizes).values())
            if name == "candidates":
                scorer, history, candidates = load_scoring(options, log, domain, bundle)
                found = ((x, score(scorer, history, candidates[:x])) for x in options.candidates)
            else:
                found = (
                    (one.x, train(sides.get(one.base, one.rank), draw(one, options.step_tokens, priority)))
                    for one in points[name]
                )
            for x, entry in found:
                entry["matmul_flops_per_s"] = rate
                rounds[name][x].append(entry | floors(entry))
                print(f"round {number + 1}, {name} {x}: {entry['per_s']:.2f} {CURVES[name][1]}/s in "
                      f"{entry['seconds']:.1f} s", flush=True)  # fmt: skip
            scorer = found = None  # so that the next curve's memory is its own
    return {
        "log": {"interactions": len(log), "users": log.num_users},
        "domain": domain.to_dict(),
        "curves": {
            name: {"along": CURVES[name][0], "unit": CURVES[name][1],
                   "points": [summarise(x, entries) for x, entries in by_x.items()]}
            for name, by_x in rounds.items()
        },
    }  # fmt: skip


def summarise(x: int, entries: list[dict]) -> dict:
    """Medians and spreads over the rounds of one point; null where the system does not tell its memory."""
    keys = ("per_s", "floor_per_s", "floor_with_attention_per_s", "share", "share_with_attention", "peak_mib")
    spreads = {key: [entry[key] for entry in entries] for key in keys}
    spreads["tokens_each"] = [entry["tokens"] / entry["count"] for entry in entries]
    spreads = {key: None if None in values else spread(values) for key, values in spreads.items()}
    return {"x": x, **spreads, "rounds": entries}


# -- showing ---------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The curves as text: medians with (least to greatest)."""

    lines = []
    for name, curve in result["curves"].items():
        lines.append(f"{name}: {curve['along']}")
        lines.append(f"{'':>6}  {curve['unit'] + '/s':<24}{'of the floor':<20}{'with attention':<20}peak MiB")
        for point in curve["points"]:
            cells = (cell(point["per_s"], "{:.2f}"), cell(point["share"], "{:.0%}"),
                     cell(point["share_with_attention"], "{:.0%}"), cell(point["peak_mib"], "{:.0f}"))  # fmt: skip
            lines.append(f"{point['x']:>6}  {cells[0]:<24}{cells[1]:<20}{cells[2]:<20}{cells[3]}")
    return "\n".join(lines)


def plot(curve: dict, path: Path) -> None:
    """A curve with both floors, and the peak memory below it; axes are logarithmic where values span a factor of 8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter

    figure = Figure(figsize=(7, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    points = sorted(curve["points"], key=lambda point: point["x"])
    xs = [point["x"] for point in points]

    def line(axes, key: str, label: str | None, style: str, colour: str, bars: bool) -> list[float]:
        kept = [(x, point[key]) for x, point in zip(xs, points, strict=True) if point[key] is not None]
        middle = [value["median"] for _, value in kept]
        if bars and kept:
            reach = [[v["median"] - v["min"] for _, v in kept], [v["max"] - v["median"] for _, v in kept]]
            axes.errorbar([x for x, _ in kept], middle, reach, fmt=style, ms=4, capsize=3, color=colour, label=label)
        else:
            axes.plot([x for x, _ in kept], middle, style, color=colour, label=label)
        return middle

    shown = line(above, "floor_per_s", "what products with weights alone would allow", "--", "#8a8a8a", False)
    shown += line(above, "floor_with_attention_per_s", "the same with attention's products", ":", "#3b8a4f", False)
    shown += line(above, "per_s", "measured", "o-", "#1f5fa8", True)
    line(below, "peak_mib", None, "o-", "#d1661c", True)
    if max(shown) >= 8 * min(shown):
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter(ScalarFormatter())
    else:
        above.set_ylim(bottom=0)
    below.set_ylim(bottom=0)
    if min(xs) > 0 and max(xs) >= 8 * min(xs):
        below.set_xscale("log")
    below.xaxis.set_major_locator(FixedLocator(xs))
    below.xaxis.set_major_formatter(ScalarFormatter())
    below.xaxis.set_minor_locator(NullLocator())
    above.yaxis.set_minor_formatter(NullFormatter())
    above.set_ylabel(f"{curve['unit']}/s")
    below.set_ylabel("peak memory, MiB")
    below.set_xlabel(curve["along"])
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; the tokens of a micro-batch and the learning rate are the recipe's."""
    recipe = yaml.safe_load((CONFIG / "lora.yaml").read_text())["train"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of a log; default: where the downloader puts MovieLens")
    parser.add_argument("--domain", default=str(CONFIG / "domain.yaml"), help="domain file")
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--curves", nargs="+", choices=tuple(CURVES), default=list(CURVES), help="default: all")
    parser.add_argument("--context", type=int, nargs="+", default=[0, 5, 10, 20, 40], help="points of this curve")
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 4, 10, 30], help="the same")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 5, 20, 50, 200], help="the same")
    parser.add_argument("--rank", type=int, nargs="+", default=[2, 8, 16, 64], help="the same")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10, 20, 30], help="the same")
    parser.add_argument("--window", type=int, nargs=2, metavar=("CONTEXT", "TARGETS"), help="default: the domain's")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of a window, at most")
    parser.add_argument("--step-tokens", type=int, default=1800, help="tokens of a point's step, at least")
    parser.add_argument("--micro-tokens", type=int, default=recipe["micro_tokens"], help="tokens of a micro-batch")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of the history in scoring, at least")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each point takes")
    parser.add_argument("--matmul-sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="torch.mm sizes")
    parser.add_argument("--learning-rate", type=float, default=recipe["learning_rate"])
    parser.add_argument("--seed", type=int, default=0, help="of windows, adapters and candidates")
    parser.add_argument(
        "--output", default=str(ROOT / "results" / "cost_curves.json"), help="result file; the plots beside it"
    )
    options = parser.parse_args(arguments)
    options.curves = [name for name in CURVES if name in options.curves]
    for name in CURVES:
        setattr(options, name, sorted(set(getattr(options, name))))
    return options


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print the table, write the result and a plot a curve; returns the result."""
    options = parse(arguments)
    try:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            result = run(options, Path(scratch))
    except LLMRecError as error:
        stop(str(error))
    print(table(result))
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "domain", "output")}
    settings |= {"base": Path(options.base).name, "default_rank": RANK}
    given = sys.argv[1:] if arguments is None else arguments
    result = {"settings": settings, **header(__file__, given, options.seed), **result}
    write_result(options.output, result)
    for name, curve in result["curves"].items():
        plot(curve, Path(options.output).parent / f"cost_{name}.png")
    return result


if __name__ == "__main__":
    main()
