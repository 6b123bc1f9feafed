"""Streams beside other tools: quality against training time, throughput and memory.

    python -m benchmarks.quality.peers.compare --data DIR [--seconds 600] [--swift-env DIR]

Systems: `streams` is the package; `plain` and `instruction` are those of plain.py; with --swift-env, `swift` is
ms-swift in an environment of its own (swift.py). All train LoRA of one rank on all linear layers of the same base in
float32 with the same constant learning rate, on the targets of the same training windows, and predict the same
validation targets. Streams take whole windows; the peers take one prompt a target with the same history, all in the
same batches of like length. Each starts as by default: the head of streams from the label words, that of plain and
swift at random.

Each runs in a process of its own and trains for --seconds; set-up and evaluation do not count. swift trains as many
steps as plain, timed by its own log. Tokens a target are positions computed in training, padding included. AUC between
two points of a curve is interpolated.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from benchmarks.measuring import RECIPE, Benchmark, in_processes, memory_mib, metrics_of, read_streams, run, stop
from benchmarks.quality.peers import plain
from benchmarks.quality.peers.streams import TargetPrompts, domain_with_windows, draw_spread_over_users, texts_of
from benchmarks.quality.peers.swift import train_swift
from benchmarks.training import PositionCounter, behavior_trainer, training_arguments
from llmrec_peft import Domain, load_classifier
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.streams import StreamSubset
from llmrec_peft.models.base import resolve_base
from llmrec_peft.models.head import first_tokens
from llmrec_peft.models.predict import predict

# The peers first: streams then predict once more at the number of targets that the slowest of them came to.
SYSTEMS = ("plain", "instruction", "swift", "streams")
METRICS = ("auc", "logloss")
MEGABATCH = 50  # batches that are sorted by length together, as group_by_length of Transformers does
Curve = Sequence[Mapping[str, float]]


# -- what all systems share ------------------------------------------------------------------------


def batch_order(lengths: np.ndarray, batch: int, seed: int) -> np.ndarray:
    """An order of rows in which batches are of like length and follow each other at random."""
    rng, size, batches = np.random.default_rng(seed), MEGABATCH * batch, []
    for start in range(0, len(lengths), size):
        rows = np.arange(start, min(start + size, len(lengths)))
        batches.append(rng.permutation(rows[np.argsort(-lengths[rows], kind="stable")].reshape(-1, batch)))
    return np.concatenate(batches).reshape(-1)


def prepare(options: argparse.Namespace) -> tuple[dict, dict, tuple[np.ndarray, np.ndarray]]:
    """Draw what all systems share: the job, what to state of it, and labels and users of validation."""
    domain = domain_with_windows(options.domain, options.context, options.targets)
    streams = read_streams(options, domain)
    train, valid = streams.train, streams.valid
    numbers = draw_spread_over_users(valid, options.validation, options.seed)
    # Longest first, so that batches of the evaluation hold prompts of like length.
    numbers = numbers[np.argsort(-TargetPrompts(valid, numbers).lengths, kind="stable")]
    labels, users = valid.target_labels[numbers], valid.log.user_codes[valid.target_rows[numbers]]
    if len(np.unique(labels)) < 2:
        stop(f"{len(labels)} validation targets all have one label, and AUC needs both; raise --validation")
    windows = getattr(train.limited(options.pool, options.seed), "windows", np.arange(len(train)))
    offsets = train.target_offsets
    pool = np.concatenate([np.arange(offsets[window], offsets[window + 1]) for window in windows])
    pool = np.random.default_rng(options.seed).permutation(pool)
    pool = pool[: len(pool) // options.peer_batch * options.peer_batch]
    if not len(pool):
        stop(f"--pool {options.pool}: the training windows hold less than one batch of {options.peer_batch} targets")
    pool = pool[batch_order(TargetPrompts(train, pool).lengths, options.peer_batch, options.seed)]
    job = {key: value for key, value in vars(options).items() if key != "output"} | {
        "base": resolve_base(options.base), "domain": domain.to_dict(), "validation": numbers.tolist(),
        "windows": windows.tolist(),
    }  # fmt: skip
    stated = {"log": {"interactions": len(valid.log), "users": valid.log.num_users}, "domain": job["domain"]}
    for name, part, chosen in (("training", train, pool), ("validation", valid, numbers)):
        prompts = TargetPrompts(part, chosen)
        texts = texts_of(part.vocabulary, prompts.prompts)
        job[name + "_prompts"] = texts, part.target_labels[chosen].tolist()
        again = part.vocabulary.tokenizer(texts)["input_ids"]
        other = sum(ids != prompt.input_ids.tolist() for ids, prompt in zip(again, prompts.prompts, strict=True))
        stated[name] = {"targets": len(chosen), "prompt_tokens": float(prompts.lengths.mean()),
                        "prompts_of_other_tokens": other}  # fmt: skip
    stated["training"]["windows"] = len(windows)
    stated["validation"]["users"] = len(np.unique(users))
    return job, stated, (labels, users)


# -- in the process of a system --------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Times a Trainer's steps with their data, stops it, and takes predictions now and then, outside the time.

    predict: gives probabilities [targets, labels] of the validation targets. targets_after: targets trained on after so
    many steps. Predictions are taken before the first step, at --points even parts of --seconds, at the end, and once
    `at_targets` targets are trained on.
    """

    def __init__(self, predict: Callable[[], np.ndarray], targets_after: Callable[[int], int], job: dict) -> None:
        self.predict, self.targets_after, self.job = predict, targets_after, job
        self.points: list[dict[str, Any]] = []
        self.seconds, self.steps = 0.0, 0
        self._mark: float | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Predict once before the first step, and start the clock."""
        if self._mark is None:
            self._record()
            self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Add the step's time; predict where that is due; stop at the end."""
        self.seconds += time.perf_counter() - self._mark
        self.steps += 1
        last, part = self.points[-1], self.job["seconds"] / self.job["points"]
        ended = self.seconds >= self.job["seconds"] or self.steps == self.job["steps"]
        at_targets = self.job["at_targets"] or float("inf")
        reached = last["targets"] < at_targets <= self.targets_after(self.steps)
        if ended or reached or self.seconds // part > last["seconds"] // part:
            self._record()
        control.should_training_stop = control.should_training_stop or ended
        self._mark = time.perf_counter()

    def _record(self) -> None:
        point = {"seconds": self.seconds, "steps": self.steps, "targets": self.targets_after(self.steps)}
        self.points.append(point | {"p": np.asarray(self.predict(), np.float64).tolist()})


def stream_system(job: dict, scratch: str):
    """A trainer, predictions of the validation targets, and targets after so many steps: streams."""
    streams = read_streams(argparse.Namespace(**job), Domain.from_dict(job["domain"]))
    wanted = np.array(job["validation"])
    torch.manual_seed(job["seed"])
    classifier = load_classifier(job["base"], streams.train.domain, "lora", r=job["r"], alpha=job["alpha"])
    collator = StreamCollator(classifier.tokenizer.pad_token_id, job["micro_tokens"])
    # Prompts, not windows: 150 targets of many users lie in as many windows. The predictions are the same.
    prompts = TargetPrompts(streams.valid, wanted)

    def probabilities() -> torch.Tensor:
        found = predict(classifier, prompts, collator, batch_tokens=job["micro_tokens"])
        return torch.from_numpy(found.logits[np.searchsorted(found.targets, wanted)]).softmax(1)

    arguments = training_arguments(scratch, num_train_epochs=1000, per_device_train_batch_size=job["batch_size"],
                                   learning_rate=job["learning_rate"], seed=job["seed"])  # fmt: skip
    windows = StreamSubset(streams.train, np.array(job["windows"]))
    trainer = behavior_trainer(classifier, arguments, windows, job["micro_tokens"])
    return trainer, classifier.stock, probabilities, lambda steps: trainer.targets_seen


def peer_system(job: dict, scratch: str, words: bool):
    """The same of a peer: with `words` instruction tuning, else sequence classification."""
    lora, outcomes = {key: job[key] for key in ("r", "alpha", "seed")}, job["domain"]["outcomes"]
    if words:
        model, tokenizer = plain.load_instruction(job["base"], **lora)
        tokens = first_tokens(tokenizer, outcomes)
    else:
        model, tokenizer = plain.load_plain(job["base"], len(outcomes), **lora)
        tokens = None
    prompts = plain.PromptDataset(*job["validation_prompts"], tokenizer)
    rows = [(ids, [len(ids) - 1]) for ids in prompts.prompts]

    def probabilities() -> torch.Tensor:
        if words:
            return plain.word_probabilities(model, rows, tokens)
        return plain.plain_logits(model, tokenizer, prompts, job["evaluation_batch"]).softmax(1)

    trainer, _ = plain.plain_trainer(
        model, tokenizer, plain.PromptDataset(*job["training_prompts"], tokenizer, tokens), scratch,
        batch_size=job["peer_batch"] // job["peer_accumulation"], accumulation=job["peer_accumulation"],
        learning_rate=job["learning_rate"], seed=job["seed"], train_sampling_strategy="sequential",
        num_train_epochs=1000,
    )  # fmt: skip
    return trainer, model, probabilities, lambda steps: steps * job["peer_batch"]


def train_system(name: str, place: str) -> dict:
    """Train one system until its budget is spent; the curve with predictions, and what was measured."""
    job = json.loads(Path(place).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        if name == "swift":
            return train_swift(job, Path(scratch))
        made = stream_system(job, scratch) if name == "streams" else peer_system(job, scratch, name == "instruction")
        trainer, model, probabilities, targets_after = made
        recorder, counter = Recorder(probabilities, targets_after, job), PositionCounter(model)
        trainer.add_callback(recorder)
        trainer.train()
    return {
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "tokens_per_target": counter.count / recorder.points[-1]["targets"], "peak_rss_mib": memory_mib(),
        "curve": recorder.points,
    }  # fmt: skip


# -- curves side by side ---------------------------------------------------------------------------


def auc_at(curve: Curve, axis: str, value: float) -> float | None:
    """AUC where `axis` ("seconds" or "targets") has `value`; None outside the curve."""
    places = [point[axis] for point in curve]
    if not places or not places[0] <= value <= places[-1]:
        return None
    return float(np.interp(value, places, [point["auc"] for point in curve]))


def seconds_to(curve: Curve, auc: float) -> float | None:
    """Training seconds until the curve first has `auc`; None where it never does."""
    for before, point in zip([curve[0], *curve], curve, strict=False):
        if point["auc"] >= auc:
            rise = point["auc"] - before["auc"]
            part = (auc - before["auc"]) / rise if rise else 1.0
            return float(before["seconds"] + part * (point["seconds"] - before["seconds"]))
    return None


def side_by_side(curves: Mapping[str, Curve], auc: float) -> tuple[dict, dict[str, dict]]:
    """Where curves are compared (the ends of the shortest, and `auc`), and each system's values there."""
    at = {axis: min(curve[-1][axis] for curve in curves.values()) for axis in ("seconds", "targets")}
    return at | {"auc": auc}, {
        name: {"auc_at_equal_seconds": auc_at(curve, "seconds", at["seconds"]),
               "auc_at_equal_targets": auc_at(curve, "targets", at["targets"]),
               "seconds_to_auc": seconds_to(curve, auc)}
        for name, curve in curves.items()
    }  # fmt: skip


def ends(found: Mapping[str, float | None]) -> list[float] | None:
    """An interval as [low, high], None where there is none."""
    return None if found["low"] is None else [found["low"], found["high"]]


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """All systems, one after another, and their curves side by side."""
    options.systems = [name for name in SYSTEMS if name in options.systems and (name != "swift" or options.swift_env)]
    if "swift" in options.systems and "plain" not in options.systems:
        stop("swift trains as many steps as plain came to; add plain to --systems")
    if options.peer_batch % options.peer_accumulation:
        stop(f"--peer-batch {options.peer_batch} must be a multiple of --peer-accumulation")
    job, stated, (labels, users) = prepare(options)
    draw, systems, last = {"samples": options.bootstrap, "seed": options.seed}, {}, {}
    for name in options.systems:
        job["at_targets"] = min((entry["targets"] for entry in systems.values()), default=None)
        job["plain_steps"] = systems.get("plain", {}).get("steps")
        (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
        ((measured,), _) = in_processes(__file__, scratch, "train_system", name, str(scratch / "job.json"))
        for point in measured["curve"]:
            last[name] = np.array(point.pop("p"))
            found = metrics_of(METRICS, labels, last[name], users, **draw)
            point |= {key: found[key]["value"] for key in METRICS} | {"auc_interval": ends(found["auc"])}
        end = measured["curve"][-1]
        systems[name] = {**{key: end[key] for key in ("targets", "steps", "seconds")},
                         "targets_per_s": end["targets"] / end["seconds"], **measured}  # fmt: skip
    at, compared = side_by_side({name: entry["curve"] for name, entry in systems.items()}, options.auc)
    for name, entry in systems.items():
        entry |= compared[name]
        if name != "streams" and "streams" in systems:
            found = metrics_of(METRICS, labels, last["streams"], users, minus=last[name], **draw)
            entry["streams_minus_this_at_the_end"] = {
                key: {"value": value["value"], "interval": ends(value)} for key, value in found.items()
            }
    return {**stated, "compared_at": at, "systems": systems}


BENCHMARK = Benchmark(measure, "peers.json", {
    "systems": (list(SYSTEMS), "systems to train; swift needs --swift-env", SYSTEMS),
    "swift_env": (None, "directory of ms-swift's environment, made if it does not exist"),
    "seconds": (600.0, "training time of each system"),
    "steps": (0, "end a system earlier, after so many steps (0: never)"),
    "points": (6, "evaluations of a curve after the one at its start"), "validation": (150, "validation targets"),
    "pool": (4000, "training targets to choose from, at least"),
    "context": (0, "history events before a window's targets; with --targets (default: the domain's)"),
    "targets": (0, "targets of a window (default: the domain's)"),
    "batch_size": (RECIPE["train"]["batch_size"], "windows of a step of streams"),
    "micro_tokens": (RECIPE["train"]["micro_tokens"], "tokens of a micro-batch of streams"),
    "peer_batch": (8, "targets of a step of the peers"),
    "peer_accumulation": (1, "micro-batches of such a step"),
    "evaluation_batch": (4, "prompts of a batch of plain predictions"),
    "learning_rate": (RECIPE["train"]["learning_rate"], "learning rate"),
    "r": (RECIPE["method"]["r"], "rank of LoRA"), "alpha": (RECIPE["method"]["alpha"], "alpha of LoRA"),
    "auc": (0.8, "validation AUC whose time is reported"), "bootstrap": (1000, "samples of the intervals"),
}, "movies")  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARK)

if __name__ == "__main__":
    main()
