"""Targets/s and peak memory along what a target costs: `python -m benchmarks.train_speed curves`.

The curves go along history events, targets of a window, candidates of one new history (scoring), rank, and layers of
the base (the first so many). Points of one round see the same windows as far as these have the same first target. The
floor is the time of the operations (training.py) alone at the rate of torch.mm:

    floor = targets * rate / (tokens * operations a token [+ operations of attention])
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring import RECIPE, Benchmark, memory_mib, read_log, release_memory, reset_peak, spread, stop
from benchmarks.quality.peers.streams import domain_with_windows
from benchmarks.score_speed import pick_request
from benchmarks.training import RANK, attention_flops, flops_per_token, make_bundle, matmul_rate, train_streams, warm_up
from llmrec_peft import Domain, Scorer, load_classifier
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.distillation.shallow_student import write_shallow_student
from llmrec_peft.models.base import load_config, load_tokenizer, resolve_base
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.requests.request import Request
from llmrec_peft.runs.split_streams import split_by_domain, streams_for_split

CURVES = {
    "context": ("history events before the targets", "targets"),
    "targets": ("events predicted in a window", "targets"),
    "candidates": ("candidates scored on one history", "candidates"),
    "rank": ("rank of LoRA", "targets"),
    "layers": ("layers of the base", "targets"),
}
"""What each curve goes along, and what is counted a second. Its points are the option of the same name."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a training curve: its place, the base, the rank, and the windows to draw from (numbers [n])."""

    x: int
    base: str
    rank: int
    streams: StreamDataset
    windows: np.ndarray

    @property
    def first_rows(self) -> np.ndarray:
        """The log's row of each window's first target."""
        return self.streams.target_rows[self.streams.target_offsets[self.windows]]

    def draw(self, tokens: int, priority: np.ndarray) -> StreamSubset:
        """Windows in the order of `priority` [rows of the log] at their first targets that hold `tokens` tokens."""
        order = self.windows[np.argsort(priority[self.first_rows], kind="stable")]
        count = int(np.searchsorted(np.cumsum(self.streams.lengths[order]), tokens)) + 1
        return StreamSubset(self.streams, np.sort(order[:count]))


def floors(entry: dict) -> dict[str, float]:
    """Units a second at the floor without and with attention, and the measured shares of both."""
    weights, work = entry["tokens"] * entry["flops_per_token"], entry["count"] * entry["matmul_flops_per_s"]
    floor, both = work / weights, work / (weights + entry["attention_flops"])
    return {"floor_per_s": floor, "floor_with_attention_per_s": both, "share": entry["per_s"] / floor,
            "share_with_attention": entry["per_s"] / both}  # fmt: skip


def layer_base(base: str, domain: Domain, layers: int, scratch: Path) -> str:
    """A base with the first `layers` layers alone; the base itself where these are all."""
    depth = load_config(base).get_text_config().num_hidden_layers
    if layers > depth:
        stop(f"--layers must be at most {depth}, the layers the base has, got {layers}")
    directory = scratch / f"layers-{layers}"
    if layers < depth and not directory.exists():
        write_shallow_student(load_classifier(base, domain, "head"), list(range(layers)), directory)
    return base if layers == depth else str(directory)


def lay_out(options: argparse.Namespace, log, base: str, scratch: Path) -> dict[str, list[Point]]:
    """The points of the training curves."""
    tokenizer, (context, targets) = load_tokenizer(base), options.window

    @functools.cache
    def streams(context: int, targets: int) -> tuple[StreamDataset, np.ndarray]:
        domain = domain_with_windows(options.domain, context, targets, options.max_length)
        found = streams_for_split(split_by_domain(log, domain), "train", domain, tokenizer)
        windows = np.flatnonzero((found.history_sizes == context) & (np.diff(found.target_offsets) == targets))
        if not len(windows):
            stop(f"no training window has {context} history events and {targets} targets; ask for fewer")
        return found, windows

    domain = Domain.from_yaml(options.domain)
    made = {
        "context": lambda x: Point(x, base, RANK, *streams(x, targets)),
        "targets": lambda x: Point(x, base, RANK, *streams(context, x)),
        "rank": lambda x: Point(x, base, x, *streams(context, targets)),
        "layers": lambda x: Point(x, layer_base(base, domain, x, scratch), RANK, *streams(context, targets)),
    }
    points = {name: [made[name](x) for x in sorted(getattr(options, name))] for name in options.curves if name in made}
    if "context" in points:
        shared = functools.reduce(np.intersect1d, [one.first_rows for one in points["context"]])
        if not len(shared):
            stop("no targets have all of the histories of --context; ask for fewer events")
        points["context"] = [dataclasses.replace(one, windows=one.windows[np.isin(one.first_rows, shared)])
                             for one in points["context"]]  # fmt: skip
    return points


def train_point(point: Point, priority: np.ndarray, options: argparse.Namespace, scratch: Path) -> dict:
    """One step of a training point."""
    torch.manual_seed(options.seed)
    classifier = load_classifier(point.base, point.streams.domain, "lora", r=point.rank, alpha=2 * point.rank)
    warm_up(classifier)
    windows = point.draw(options.step_tokens, priority)
    release_memory()
    rest = memory_mib("VmRSS")
    found = train_streams(classifier, windows, 1, options, scratch)
    positions = (windows[number].position_ids for number in range(len(windows)))
    return {
        "count": found["targets"], "tokens": found["tokens"], "seconds": found["seconds"],
        "per_s": found["targets_per_s"], "peak_mib": found["peak_rss_mib"], "rest_mib": rest,
        "flops_per_token": flops_per_token(classifier)["flops_per_token"],
        "attention_flops": sum(attention_flops(one, classifier.config, training=True) for one in positions),
    }  # fmt: skip


def score_points(options: argparse.Namespace, log, bundle: Path, costs: tuple):
    """(number of candidates, entry) of each point of the curve of candidates; equal texts are scored once."""
    scorer, (flops, config) = Scorer.load(bundle, log, cache_bytes=0), costs
    history, candidates = pick_request(log, scorer, options.tokens, max(options.candidates), options.seed)
    scorer.score(history[:1], candidates[:1])  # warms up
    for x in sorted(options.candidates):
        encoded = scorer.encoder.encode(Request(history, candidates[:x]))
        prefix = sum(map(len, encoded.prefix.pieces()))
        # Positions go on from the prefix in each candidate.
        own = {tokens.tobytes(): prefix + np.arange(len(tokens)) for tokens in encoded.candidates}
        positions = np.concatenate([np.arange(prefix), *own.values()])
        reset_peak()
        rest, start = memory_mib("VmRSS"), time.perf_counter()
        scorer.score(history, candidates[:x])
        seconds = time.perf_counter() - start
        yield x, {
            "count": x, "tokens": len(positions), "seconds": seconds, "per_s": x / seconds,
            "peak_mib": memory_mib(), "rest_mib": rest, "flops_per_token": flops,
            "attention_flops": attention_flops(positions, config, training=False),
        }  # fmt: skip


def curves(options: argparse.Namespace, scratch: Path) -> dict:
    """Throughput and memory by context, targets, candidates, rank and layers."""
    log, domain, base = read_log(options), Domain.from_yaml(options.domain), resolve_base(options.base)
    options.window = options.window if options.window[1] else [domain.stream.context, domain.stream.targets]
    if "candidates" in options.curves and max(options.candidates) > log.num_items:
        stop(f"--candidates must be at most {log.num_items}, the items the log has, got {max(options.candidates)}")
    check_positions(load_config(base), options.max_length)
    points = lay_out(options, log, base, scratch)
    if "candidates" in options.curves:
        bundle = make_bundle(scratch / "bundle", base, domain, seed=options.seed, r=RANK)
        costs = (2 * flops_per_token(load_classifier(base, domain, "head"))["base_parameters"], load_config(base))
    rounds: dict = {name: {x: [] for x in sorted(getattr(options, name))} for name in options.curves}
    for number in range(options.rounds):
        priority = np.random.default_rng([options.seed, number]).random(len(log))
        for name in options.curves:
            rate = matmul_rate(options.matmul_sizes)
            if name == "candidates":
                entries = score_points(options, log, bundle, costs)
            else:
                entries = ((one.x, train_point(one, priority, options, scratch)) for one in points[name])
            for x, entry in entries:
                entry["matmul_flops_per_s"] = rate
                rounds[name][x].append(entry | floors(entry))
    return {
        "settings": {"default_rank": RANK, "window": options.window},
        "log": {"interactions": len(log), "users": log.num_users}, "domain": domain.to_dict(),
        "curves": {name: {"along": CURVES[name][0], "unit": CURVES[name][1],
                          "points": [point_summary(x, entries) for x, entries in by_x.items()]}
                   for name, by_x in rounds.items()},
    }  # fmt: skip


def point_summary(x: int, entries: list[dict]) -> dict:
    """Medians and spreads over the rounds of one point; null where the system does not tell its memory."""
    keys = ("per_s", "floor_per_s", "floor_with_attention_per_s", "share", "share_with_attention", "peak_mib")
    found = {key: [entry[key] for entry in entries] for key in keys}
    found["tokens_each"] = [entry["tokens"] / entry["count"] for entry in entries]
    return {"x": x, **{key: None if None in values else spread(values) for key, values in found.items()},
            "rounds": entries}  # fmt: skip


TRAINING = {
    "rounds": (3, "rounds; each measures everything once"),
    "micro_tokens": (RECIPE["train"]["micro_tokens"], "tokens of a micro-batch"),
    "learning_rate": (RECIPE["train"]["learning_rate"], "learning rate"),
    "matmul_sizes": ([1024, 2048, 4096], "sizes of torch.mm; the best rate counts"),
}
CURVES_BENCHMARK = Benchmark(curves, "cost_curves.json", TRAINING | {
    "curves": (list(CURVES), "curves to measure", CURVES),
    "context": ([0, 5, 10, 20, 40], "points of this curve"), "targets": ([1, 4, 10, 30], "the same"),
    "candidates": ([1, 5, 20, 50, 200], "the same"), "rank": ([2, 8, 16, 64], "the same"),
    "layers": ([5, 10, 20, 30], "the same"),
    "window": ([0, 0], "context and targets of a window where no point sets them (default: the domain's)"),
    "max_length": (4096, "tokens of a window, at most"), "step_tokens": (1800, "tokens of a step, at least"),
    "tokens": (400, "tokens of the history in scoring, at least"),
}, "movies")  # fmt: skip
