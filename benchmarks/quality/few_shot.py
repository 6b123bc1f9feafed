"""AUC after training on few labelled targets, as TALLRec reports it (arXiv 2305.00447): 16, 64 and 256, several seeds.

    python -m benchmarks.quality.few_shot --data DIR [--targets 16 64 256] [--seeds 0 1 2]

`streams` is the package on windows of --window targets, `instruction` TALLRec's way (peers/plain.py) with one prompt a
target. Both train on the very same targets of a seed with the same histories, token for token: at most --history
events, --window - 1 fewer at a window's start. LoRA, learning rate, schedule and untrained predictions are the same,
as the head of streams starts from the label words. A run makes as few whole passes as show it --seen targets, in steps
of --batch-size windows or as many targets in prompts.

Test windows are drawn in turns over users, the same for all runs, and scored once; there is no validation. Both are
scored on whole windows, since a causal model predicts inside a window what it predicts after the prompt alone; where a
window has candidates, instruction is scored on prompts. Beside them stands the rate of likes among each user's newest
earlier events. About 40 minutes on two cores with MovieLens.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring import Benchmark, columns, metrics_of, read_streams, run, spread, stop
from benchmarks.quality.count_features import CountFeatures, Points
from benchmarks.quality.peers.plain import PromptDataset, load_instruction, plain_trainer, word_probabilities
from benchmarks.quality.peers.streams import TargetPrompts, domain_with_windows, draw_spread_over_users
from benchmarks.training import StepClock, behavior_trainer, training_arguments
from llmrec_peft import load_classifier
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.models.base import resolve_base
from llmrec_peft.models.head import first_tokens
from llmrec_peft.models.predict import predict
from llmrec_peft.runs.split_streams import SplitStreams

METRICS = ("auc", "gauc", "logloss")
FIXED = {"r": 16, "alpha": 32, "test_seed": 0, "micro_tokens": 1200}
BATCH_TOKENS = 4000  # of a batch of test windows


# -- what is drawn ---------------------------------------------------------------------------------


def numbers_of(part: StreamSubset) -> np.ndarray:
    """Target numbers of a subset's windows, int64 [targets]."""
    offsets = part.parent.target_offsets
    return np.concatenate([np.arange(offsets[window], offsets[window + 1]) for window in part.windows])


def users_of(part: StreamSubset) -> np.ndarray:
    """User codes of a subset's targets, int [targets]."""
    return part.parent.log.user_codes[part.parent.target_rows[numbers_of(part)]]


def draw(train: StreamDataset, targets: int, seed: int) -> StreamSubset:
    """Full windows at random, of different users as far as there are such, that hold exactly so many targets."""
    most = train.domain.stream.targets
    order = np.random.default_rng(seed).permutation(np.flatnonzero(np.diff(train.target_offsets) == most))
    users = train.log.user_codes[train.target_rows[train.target_offsets[:-1]]][order]
    first = np.sort(np.unique(users, return_index=True)[1])
    part = StreamSubset(train, np.sort(np.concatenate([order[first], np.delete(order, first)])[: targets // most]))
    if len(part) * most < targets or len(np.unique(train.target_labels[numbers_of(part)])) < 2:
        stop(f"seed {seed} draws no {targets} training targets of two labels; give a longer log or another seed")
    return part


def draw_test(streams: StreamDataset, targets: int) -> StreamSubset:
    """Whole windows at random, in turns over the users, until they hold at least so many targets or all are taken."""
    order = draw_spread_over_users(streams, streams.num_targets, FIXED["test_seed"])
    windows = np.searchsorted(streams.target_offsets, order, "right") - 1
    windows = windows[np.sort(np.unique(windows, return_index=True)[1])]
    enough = int(np.searchsorted(np.cumsum(np.diff(streams.target_offsets)[windows]), targets)) + 1
    part = StreamSubset(streams, np.sort(windows[:enough]))
    pairs = np.unique(np.stack([users_of(part), streams.target_labels[numbers_of(part)]]), axis=1)
    if len(np.unique(pairs[0])) == pairs.shape[1]:
        stop(f"no user of {len(numbers_of(part))} test targets has both labels, and GAUC needs one; raise "
             "--test-targets or give a longer log")  # fmt: skip
    return part


def prompts_of(windows: StreamSubset) -> tuple[list[list[int]], list[int]]:
    """Token ids of a prompt up to its marker, and the class number, of each target of the windows."""
    numbers = numbers_of(windows)
    prompts = TargetPrompts(windows.parent, numbers).prompts
    labels = windows.parent.target_labels[numbers].tolist()
    return [prompt.input_ids[: prompt.markers[0] + 1].tolist() for prompt in prompts], labels


def rows_of(test: StreamSubset) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and markers in the order of targets: a row a window, or one a target if it has candidates."""
    rows = []
    for stream in (test[number] for number in range(len(test))):
        parts, none = [stream], np.empty(0, stream.input_ids.dtype)
        if (stream.segment > 0).any():
            parts = [stream.independent(one, none) for one in range(len(stream.targets))]
        rows += [(part.input_ids, part.markers) for part in parts]
    return rows


# -- the systems -----------------------------------------------------------------------------------


def schedule(options: argparse.Namespace, windows: StreamSubset, seed: int) -> dict:
    """Trainer arguments that both systems share: whole passes, and the learning-rate schedule over their steps."""
    passes = -(-options.seen // len(numbers_of(windows)))
    steps = passes * -(-len(windows) // options.batch_size)
    return {"num_train_epochs": passes, "learning_rate": options.learning_rate, "lr_scheduler_type": "linear",
            "warmup_steps": max(1, steps // 10), "seed": seed}  # fmt: skip


def train(trainer, clock: StepClock, settings: dict, tokens: int) -> dict:
    """Train; seconds, steps and passes that it took, and tokens of a pass."""
    trainer.train()
    return {"seconds": clock.seconds, "steps": clock.steps, "passes": settings["num_train_epochs"],
            "tokens_of_a_pass": tokens}  # fmt: skip


def run_streams(options, windows: StreamSubset | None, test: StreamSubset, seed: int, scratch: Path):
    """Train on the windows, if there are any; what it took, and probabilities [test targets, labels]."""
    torch.manual_seed(seed)
    base, lora = resolve_base(options.base), {"r": FIXED["r"], "alpha": FIXED["alpha"]}
    classifier = load_classifier(base, test.parent.domain, "lora", **lora)
    if classifier.encoder:
        stop(f"{options.base} is a bidirectional encoder and predicts no next word; give a causal --base")
    spent = {"seconds": 0.0, "steps": 0}
    if windows is not None:
        settings, clock = schedule(options, windows, seed), StepClock()
        arguments = training_arguments(scratch, per_device_train_batch_size=options.batch_size, **settings)
        trainer = behavior_trainer(classifier, arguments, windows, FIXED["micro_tokens"], clock)
        spent = train(trainer, clock, settings, int(windows.lengths.sum()))
    collator = StreamCollator(classifier.tokenizer.pad_token_id, BATCH_TOKENS)
    found = predict(classifier, test, collator, batch_tokens=BATCH_TOKENS)
    return spent, torch.softmax(torch.from_numpy(found.logits).double(), -1).numpy()


def run_instruction(options, windows: StreamSubset | None, test: StreamSubset, seed: int, scratch: Path):
    """Train on a prompt for each target of the windows, if there are any; returns what `run_streams` does."""
    model, tokenizer = load_instruction(resolve_base(options.base), r=FIXED["r"], alpha=FIXED["alpha"], seed=seed)
    words = first_tokens(tokenizer, test.parent.domain.outcomes)
    spent = {"seconds": 0.0, "steps": 0}
    if windows is not None:
        prompts, labels = prompts_of(windows)
        settings = schedule(options, windows, seed)
        trainer, clock = plain_trainer(
            model, tokenizer, PromptDataset(prompts, labels, tokenizer, words), scratch,
            batch_size=options.window, accumulation=options.batch_size, **settings,
        )  # fmt: skip
        spent = train(trainer, clock, settings, sum(map(len, prompts)))
    return spent, word_probabilities(model, rows_of(test), words).double().numpy()


SYSTEMS = {"streams": run_streams, "instruction": run_instruction}


def newest_rate(streams: SplitStreams, test: StreamSubset) -> np.ndarray:
    """Probabilities [test targets, 2] by each user's ten newest earlier events, with five more at the log's rate."""
    counts = CountFeatures(streams.log, streams.test.domain, streams.splits.train.rows, streams.test.domain.split.by)
    logits = counts.frame(Points.of(streams.test))["newest_rate"].to_numpy()[numbers_of(test)]
    return columns(1 / (1 + np.exp(-logits)))


# -- measuring -------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """All runs on few labelled targets."""
    for targets in options.targets:
        if targets % options.window:
            stop(f"{targets} targets are no whole number of windows of {options.window}; change --targets or --window")
    if options.history < options.window - 1:
        stop(f"the last of {options.window} targets of a window follows {options.window - 1} events or more, and "
             f"--history is {options.history}; raise it or lower --window")  # fmt: skip
    domain = domain_with_windows(options.domain, options.history - options.window + 1, options.window)
    if len(domain.labels) != 2:
        stop(f"few labelled targets are compared on two labels; domain {domain.name!r} has {len(domain.labels)}")
    streams = read_streams(options, domain)
    test = draw_test(streams.test, options.test_targets)
    # All are drawn before the first is trained on, so that what cannot be drawn is said at once.
    drawn = {(targets, seed): draw(streams.train, targets, seed) for targets in options.targets
             for seed in options.seeds}  # fmt: skip
    labels, users, samples = test.parent.target_labels[numbers_of(test)], users_of(test), options.bootstrap
    runs: dict = {name: {str(targets): [] for targets in (0, *options.targets)} for name in options.systems}
    gaps: dict[str, list[dict]] = {}
    for targets, seed in [(0, options.seeds[0]), *drawn]:
        p = {}
        for name in options.systems:
            spent, p[name] = SYSTEMS[name](options, drawn.get((targets, seed)), test, seed, scratch)
            values = metrics_of(METRICS, labels, p[name], users, samples=samples)
            runs[name][str(targets)].append({"seed": seed, **spent, "metrics": values})
        if targets and len(p) == 2:
            values = metrics_of(METRICS, labels, p["streams"], users, minus=p["instruction"], samples=samples)
            gaps.setdefault(str(targets), []).append({"seed": seed, "metrics": values})

    def summary(found: list[dict]) -> dict:
        return {name: spread([one["metrics"][name]["value"] for one in found]) for name in METRICS}

    return {
        "settings": FIXED, "log": streams.log.name, "domain": domain.to_dict(),
        "test": {"targets": len(labels), "users": len(np.unique(users)), "windows": len(test),
                 "tokens": int(test.lengths.sum()), "share_of_last_label": float((labels == labels.max()).mean())},
        "newest_rate": metrics_of(METRICS, (labels != domain.negative_class).astype(int), newest_rate(streams, test),
                                  users, samples=samples),
        "summary": {name: {targets: {**summary(found), "seconds": spread([one["seconds"] for one in found])}
                           for targets, found in sizes.items()} for name, sizes in runs.items()},
        "streams_minus_instruction": {"summary": {targets: summary(found) for targets, found in gaps.items()},
                                      "runs": gaps},
        "runs": runs,
    }  # fmt: skip


BENCHMARK = Benchmark(measure, "few_shot.json", {
    "systems": (list(SYSTEMS), "systems to train", SYSTEMS), "targets": ([16, 64, 256], "labelled targets of a run"),
    "seeds": ([0, 1, 2], "seeds of targets drawn, adapters and order"),
    "history": (10, "events that a target follows, at most"), "window": (8, "targets of a window"),
    "seen": (64, "targets that a run sees, at least, in whole passes"),
    "batch_size": (1, "windows of a step; as many targets in prompts"), "learning_rate": (3e-4, "learning rate"),
    "test_targets": (480, "test targets, at least, in whole windows"), "bootstrap": (1000, "samples of the intervals"),
}, "movies")  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARK)

if __name__ == "__main__":
    main()
