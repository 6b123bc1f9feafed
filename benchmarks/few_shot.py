"""AUC after training on few labelled targets, as TALLRec reports it (arXiv 2305.00447): 16, 64 and 256, several seeds.

Each seed draws its own training windows (of --window targets, so that a few users give them), its own adapter and
order; every run takes the same number of steps and is scored once on the same test windows. Nothing is chosen on test,
and there is no validation: so few labels leave none to spare. `0` is the base with a head of the label words' rows,
untrained.
Beside them stands the share of likes among each user's ten newest earlier events, which needs no training at all.

python benchmarks/few_shot.py --data DIR [--targets 16 64 256] [--seeds 0 1 2]
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from count_features import CountFeatures, Points
from measuring import header, quiet, spread, stop, write_result

from llmrec_peft.config import DataConfig
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.evaluation.bootstrap import intervals
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.models.classifier import load_classifier
from llmrec_peft.models.predict import predict
from llmrec_peft.pipeline.streams import build_splits, read_log
from llmrec_peft.training.trainer import BehaviorTrainer

ROOT = Path(__file__).resolve().parent
METRICS = ("auc", "gauc", "logloss")


def main(arguments: list[str] | None = None) -> dict:
    """Train, score, write the result and print the table; returns the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--domain", default=str(ROOT.parent / "recipes/configs/movies/domain.yaml"))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--targets", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=8, help="targets of a training window, at most")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a step, at most")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--test-targets", type=int, default=600)
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--output", default=str(ROOT / "results" / "few_shot.json"))
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        found = measure(options, scratch)
    shown = sys.argv[1:] if arguments is None else arguments
    result = header(__file__, shown, options.seeds[0]) | found | {"minutes": (time.perf_counter() - start) / 60}
    write_result(options.output, result)
    show(result)
    return result


def measure(options: argparse.Namespace, scratch: str) -> dict:
    log, domain = read_log(DataConfig(path=options.data)), Domain.from_yaml(options.domain)
    tokenizer = load_tokenizer(resolve_base(options.base))
    whole = build_splits(log, domain, tokenizer)
    short = dataclasses.replace(domain, stream=dataclasses.replace(domain.stream, targets=options.window))
    train = build_splits(log, short, tokenizer).train
    test = whole.test.limited(options.test_targets)
    runs = {"0": [run(options, domain, train, test, 0, seed, scratch) for seed in options.seeds[:1]]}
    for targets in options.targets:
        runs[str(targets)] = []
        for seed in options.seeds:
            runs[str(targets)].append(run(options, domain, train, test, targets, seed, scratch))
            last = runs[str(targets)][-1]
            print(f"{targets} targets, seed {seed}: AUC {last['metrics']['auc']['value']:.3f} after "
                  f"{last['seconds']:.0f} s", flush=True)  # fmt: skip
    summary = {targets: {name: spread([one["metrics"][name]["value"] for one in found]) for name in METRICS}
               for targets, found in runs.items()}  # fmt: skip
    return {
        "settings": {key: getattr(options, key) for key in ("base", "targets", "seeds", "window", "steps", "batch_size",
                                                            "learning_rate")},
        "log": log.name,
        "test": {"targets": len(numbers_of(test)), "users": len(np.unique(users_of(test)))},
        "newest_rate": newest(whole, test, options),
        "summary": summary,
        "runs": runs,
    }  # fmt: skip


def draw(train: StreamDataset, targets: int, seed: int) -> StreamSubset:
    """Full windows at random, of users of their own as far as there are such, that hold exactly so many targets."""
    counts = np.diff(train.target_offsets)
    most = int(counts.max())
    if targets % most:
        stop(f"{targets} targets are no whole number of windows of {most}; change --targets or --window")
    order = np.random.default_rng(seed).permutation(np.flatnonzero(counts == most))
    users = train.log.user_codes[train.target_rows[train.target_offsets[:-1]]][order]
    _, first = np.unique(users, return_index=True)
    order = np.concatenate([order[np.sort(first)], np.delete(order, first)])[: targets // most]
    labels = np.concatenate([train.target_labels[train.target_offsets[w] : train.target_offsets[w + 1]] for w in order])
    if len(order) * most < targets or len(np.unique(labels)) < 2:
        stop(f"seed {seed} draws no {targets} training targets of two labels; give a longer log or another seed")
    return StreamSubset(train, np.sort(order))


def run(options, domain: Domain, train: StreamDataset, test, targets: int, seed: int, scratch: str) -> dict:
    """Train on so many targets and score the test windows."""
    torch.manual_seed(seed)
    classifier = load_classifier(options.base, domain, "lora", r=16, alpha=32)
    seconds = 0.0
    if targets:
        windows = draw(train, targets, seed)
        arguments = transformers.TrainingArguments(
            output_dir=scratch, max_steps=options.steps,
            per_device_train_batch_size=min(options.batch_size, len(windows)),
            learning_rate=options.learning_rate, lr_scheduler_type="linear", warmup_steps=max(1, options.steps // 10),
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, seed=seed,
        )  # fmt: skip
        trainer = BehaviorTrainer(classifier, arguments, windows, tokenizer=classifier.tokenizer, micro_tokens=1200)
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    found = predict(classifier, test, StreamCollator(classifier.tokenizer.pad_token_id, 4000), batch_tokens=4000)
    p = torch.softmax(torch.from_numpy(found.logits).double(), -1).numpy()
    parent = getattr(test, "parent", test)
    users = parent.log.user_codes[parent.target_rows[found.targets]]
    values = intervals(METRICS, found.labels, p, users, samples=options.bootstrap)
    return {"seed": seed, "seconds": seconds, "metrics": plain(values)}


def numbers_of(test) -> np.ndarray:
    """Target numbers of a subset's windows."""
    parent = getattr(test, "parent", test)
    windows = getattr(test, "windows", np.arange(len(test)))
    return np.concatenate([np.arange(parent.target_offsets[w], parent.target_offsets[w + 1]) for w in windows])


def users_of(test) -> np.ndarray:
    """User codes of a subset's targets."""
    parent = getattr(test, "parent", test)
    return parent.log.user_codes[parent.target_rows[numbers_of(test)]]


def newest(whole, test, options: argparse.Namespace) -> dict:
    """The user's newest rate as the answer to the same targets."""
    streams = getattr(test, "parent", test)
    points, numbers = Points.of(streams), numbers_of(test)
    counts = CountFeatures(streams.log, streams.domain, whole.splits.train.rows, streams.domain.split.by)
    p = 1 / (1 + np.exp(-counts.frame(points)["newest_rate"].to_numpy()[numbers]))
    users = points.users[numbers]
    return plain(
        intervals(METRICS, points.labels[numbers], np.column_stack([1 - p, p]), users, samples=options.bootstrap)
    )


def plain(found: dict) -> dict:
    return {name: {"value": v.value, "low": v.low, "high": v.high} for name, v in found.items()}


def show(result: dict) -> None:
    """Print the medians and spreads."""
    print(f"{result['log']}: {result['test']['targets']} test targets of {result['test']['users']} users")
    for targets, values in result["summary"].items():
        cells = ", ".join(f"{name} {v['median']:.3f} ({v['min']:.3f} to {v['max']:.3f})" for name, v in values.items())
        print(f"{targets:>5} targets: {cells}")
    print("newest rate: " + ", ".join(f"{name} {v['value']:.3f}" for name, v in result["newest_rate"].items()))


if __name__ == "__main__":
    main()
