"""AUC after training on few labelled targets, as TALLRec reports it (arXiv 2305.00447): 16, 64 and 256, several seeds.

Two systems train on the very same targets of a seed, and answer the same test targets: `streams` is the package, on
windows of --window targets; `instruction` is TALLRec's way (peers/instruction.py), one prompt a target. Both see the
same history, token for token: at most --history events (TALLRec takes ten), --window - 1 fewer at a window's start.

Both train LoRA of one rank on all linear layers, with one learning rate and schedule, from the same answers: the head
of streams starts from the label words' rows, and `0` is before the first step. A run makes as few whole passes over its
targets as show it --seen of them, in steps of --batch-size windows or as many targets in prompts, so that both take the
same number of steps. A step of streams has targets of few users, one of prompts of many: each side's natural batch.

Test windows are drawn in turns over users, the same for all runs, and scored once: nothing is chosen on test, and there
is no validation, since so few labels leave none to spare. Both systems are scored on whole windows, as a causal model
answers inside a window what it answers after the prompt alone; where a window has probes (`simultaneous: isolate`,
sampled negatives), instruction is scored on prompts. Seconds are those of training, set-up and scoring left out.

Beside them stands the rate of likes among each user's newest earlier events, up to ten and five more at the log's own
rate, which needs no training of a model.

    python benchmarks/few_shot.py --data DIR [--targets 16 64 256] [--seeds 0 1 2]

That takes two cores 30 to 40 minutes with MovieLens' titles, and a quarter less with --history 8: most of it goes into
training on prompts, and into scoring.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from compare_peers import draw_validation
from count_features import CountFeatures, Points
from measuring import header, plain_intervals, quiet, spread, stop, write_result
from peers.instruction import InstructionDataset, instruction_trainer, load_instruction, probabilities_at
from peers.plain import StepClock
from peers.streams import TargetPrompts, read_domain

from llmrec_peft.config.schema import DataConfig
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.errors import LLMRecError
from llmrec_peft.evaluation.bootstrap import differences, intervals
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.models.classifier import load_classifier
from llmrec_peft.models.head import first_tokens
from llmrec_peft.models.predict import predict
from llmrec_peft.runs.split_streams import SplitStreams, build_split_streams, read_log
from llmrec_peft.training.trainer import BehaviorTrainer

ROOT = Path(__file__).resolve().parent
METRICS = ("auc", "gauc", "logloss")
RANK, ALPHA = 16, 32
TEST_SEED = 0  # of the test windows, the same whatever the runs' seeds
MICRO_TOKENS = 1200  # of a micro-batch of streams in training
BATCH_TOKENS = 4000  # of a batch of test windows


def main(arguments: list[str] | None = None) -> dict:
    """Train, score, write the result and print the table; returns the result."""
    options = parse(arguments)
    try:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            found = measure(options, scratch)
    except LLMRecError as error:
        stop(str(error))
    result = header(__file__, sys.argv[1:] if arguments is None else arguments, options.seeds[0]) | found
    write_result(options.output, result)
    show(result)
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; ends the script with one line where they contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--domain", default=str(ROOT.parent / "recipes/configs/movies/domain.yaml"))
    parser.add_argument("--base", default="smollm2-135m", help="a causal base")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--targets", type=int, nargs="+", default=[16, 64, 256], help="labelled targets of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of targets drawn, adapters and order")
    parser.add_argument("--history", type=int, default=10, help="events that a target follows, at most")
    parser.add_argument("--window", type=int, default=8, help="targets of a window")
    parser.add_argument("--seen", type=int, default=64, help="targets that a run sees, at least, in whole passes")
    parser.add_argument("--batch-size", type=int, default=1, help="windows of a step; as many targets in prompts")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--test-targets", type=int, default=480, help="at least, in whole windows")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--output", default=str(ROOT / "results" / "few_shot.json"))
    options = parser.parse_args(arguments)
    for name in ("window", "seen", "batch_size", "test_targets", "bootstrap"):
        if getattr(options, name) < 1:
            stop(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(options, name)}")
    for targets in options.targets:
        if targets < 1 or targets % options.window:
            stop(f"{targets} targets are no whole number of windows of {options.window}; change --targets or --window")
    if options.history < options.window - 1:
        stop(f"the last of {options.window} targets of a window follows {options.window - 1} events or more, and "
             f"--history is {options.history}; raise it or lower --window")  # fmt: skip
    return options


def measure(options: argparse.Namespace, scratch: str) -> dict:
    """All runs: what the result file says after its header."""
    domain = read_domain(options.domain, options.history - options.window + 1, options.window)
    if len(domain.labels) != 2:
        stop(f"few labelled targets are compared on two labels; domain '{domain.name}' has {len(domain.labels)}")
    base = resolve_base(options.base)
    streams = build_split_streams(read_log(DataConfig(path=options.data)), domain, load_tokenizer(base))
    test = draw_test(streams.test, options.test_targets)
    # All are drawn before the first is trained on, so that what cannot be drawn is said at once.
    drawn = {(targets, seed): draw(streams.train, targets, seed) for targets in options.targets
             for seed in options.seeds}  # fmt: skip
    labels, users = test.parent.target_labels[numbers_of(test)], users_of(test)
    runs = {name: {str(targets): [] for targets in (0, *options.targets)} for name in options.systems}
    gaps: dict[str, list[dict]] = {}
    for targets, seed in [(0, options.seeds[0]), *drawn]:
        answers = {}
        for name in options.systems:
            spent, answers[name] = SYSTEMS[name](options, base, drawn.get((targets, seed)), test, seed, scratch)
            values = intervals(METRICS, labels, answers[name], users, samples=options.bootstrap)
            runs[name][str(targets)].append({"seed": seed, **spent, "metrics": plain_intervals(values)})
            print(f"{name}, {targets} targets, seed {seed}: AUC {values['auc'].value:.3f} after {spent['steps']} steps "
                  f"in {spent['seconds']:.0f} s", flush=True)  # fmt: skip
        if targets and len(answers) == 2:
            found = differences(METRICS, labels, answers["instruction"], answers["streams"], users,
                                samples=options.bootstrap)  # fmt: skip
            gaps.setdefault(str(targets), []).append({"seed": seed, "metrics": plain_intervals(found)})
    return {
        "settings": {key: getattr(options, key) for key in ("base", "systems", "targets", "seeds", "history", "window",
                                                            "seen", "batch_size", "learning_rate", "test_targets",
                                                            "bootstrap")}
        | {"micro_tokens": MICRO_TOKENS, "r": RANK, "alpha": ALPHA, "test_seed": TEST_SEED},
        "log": streams.log.name,
        "domain": domain.to_dict(),
        "test": {"targets": len(labels), "users": len(np.unique(users)), "windows": len(test),
                 "tokens": int(test.lengths.sum()), "share_of_last_label": float((labels == labels.max()).mean())},
        "newest_rate": newest(streams, test, options.bootstrap),
        "summary": {name: {targets: {**summary(found), "seconds": spread([run["seconds"] for run in found])}
                           for targets, found in sizes.items()} for name, sizes in runs.items()},
        "streams_minus_instruction": {"summary": {targets: summary(found) for targets, found in gaps.items()},
                                      "runs": gaps},
        "runs": runs,
    }  # fmt: skip


# -- what is drawn ---------------------------------------------------------------------------------------------------


def draw(train: StreamDataset, targets: int, seed: int) -> StreamSubset:
    """Full windows at random, of users of their own as far as there are such, that hold exactly so many targets.

    targets: a multiple of the domain's stream.targets.
    """
    counts = np.diff(train.target_offsets)
    most = train.domain.stream.targets
    order = np.random.default_rng(seed).permutation(np.flatnonzero(counts == most))
    users = train.log.user_codes[train.target_rows[train.target_offsets[:-1]]][order]
    _, first = np.unique(users, return_index=True)
    order = np.concatenate([order[np.sort(first)], np.delete(order, first)])[: targets // most]
    part = StreamSubset(train, np.sort(order))
    if len(order) * most < targets or len(np.unique(train.target_labels[numbers_of(part)])) < 2:
        stop(f"seed {seed} draws no {targets} training targets of two labels; give a longer log or another seed")
    return part


def draw_test(streams: StreamDataset, targets: int) -> StreamSubset:
    """Whole windows at random, in turns over the users, until they hold at least so many targets or all are taken."""
    order = draw_validation(streams, streams.num_targets, TEST_SEED)
    windows = np.searchsorted(streams.target_offsets, order, "right") - 1
    _, first = np.unique(windows, return_index=True)
    windows = windows[np.sort(first)]
    enough = int(np.searchsorted(np.cumsum(np.diff(streams.target_offsets)[windows]), targets)) + 1
    part = StreamSubset(streams, np.sort(windows[:enough]))
    pairs = np.unique(np.stack([users_of(part), streams.target_labels[numbers_of(part)]]), axis=1)
    if len(np.unique(pairs[0])) == pairs.shape[1]:
        stop(f"no user of {len(numbers_of(part))} test targets has both labels, and GAUC needs one; raise "
             "--test-targets or give a longer log")  # fmt: skip
    return part


def numbers_of(part: StreamSubset) -> np.ndarray:
    """Target numbers of a subset's windows, int64 [targets]."""
    offsets = part.parent.target_offsets
    return np.concatenate([np.arange(offsets[window], offsets[window + 1]) for window in part.windows])


def users_of(part: StreamSubset) -> np.ndarray:
    """User codes of a subset's targets, int [targets]."""
    return part.parent.log.user_codes[part.parent.target_rows[numbers_of(part)]]


# -- the systems -----------------------------------------------------------------------------------------------------


def schedule(options: argparse.Namespace, windows: StreamSubset, seed: int) -> dict:
    """Trainer settings that both systems share: whole passes, and the learning rate's course over their steps."""
    passes = -(-options.seen // len(numbers_of(windows)))
    steps = passes * -(-len(windows) // options.batch_size)
    return {"num_train_epochs": passes, "learning_rate": options.learning_rate, "lr_scheduler_type": "linear",
            "warmup_steps": max(1, steps // 10), "seed": seed}  # fmt: skip


def run_streams(
    options: argparse.Namespace, base: str, windows: StreamSubset | None, test: StreamSubset, seed: int, scratch: str
) -> tuple[dict, np.ndarray]:
    """Train on the windows, if there are any; what it took, and probabilities [test targets, labels]."""
    torch.manual_seed(seed)
    classifier = load_classifier(base, test.parent.domain, "lora", r=RANK, alpha=ALPHA)
    if classifier.encoder:
        stop(f"{options.base} reads both ways and says no next word; give a causal --base")
    spent = {"seconds": 0.0, "steps": 0}
    if windows is not None:
        settings = schedule(options, windows, seed)
        arguments = transformers.TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=options.batch_size, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        clock = StepClock()
        trainer = BehaviorTrainer(classifier, arguments, windows, tokenizer=classifier.tokenizer,
                                  micro_tokens=MICRO_TOKENS, callbacks=[clock])  # fmt: skip
        spent = trained(trainer, clock, settings, int(windows.lengths.sum()))
    collator = StreamCollator(classifier.tokenizer.pad_token_id, BATCH_TOKENS)
    found = predict(classifier, test, collator, batch_tokens=BATCH_TOKENS)
    return spent, torch.softmax(torch.from_numpy(found.logits).double(), -1).numpy()


def run_instruction(
    options: argparse.Namespace, base: str, windows: StreamSubset | None, test: StreamSubset, seed: int, scratch: str
) -> tuple[dict, np.ndarray]:
    """Train on a prompt for each target of the windows, if there are any; returns what `run_streams` does."""
    model, tokenizer = load_instruction(base, r=RANK, alpha=ALPHA, seed=seed)
    answers = first_tokens(tokenizer, test.parent.domain.outcomes)
    spent = {"seconds": 0.0, "steps": 0}
    if windows is not None:
        prompts, labels = prompts_of(windows)
        settings = schedule(options, windows, seed)
        trainer, clock = instruction_trainer(
            model, tokenizer, InstructionDataset(prompts, labels, tokenizer, answers), scratch,
            batch_size=options.window, accumulation=options.batch_size, **settings,
        )  # fmt: skip
        spent = trained(trainer, clock, settings, sum(len(ids) for ids in prompts))
    return spent, probabilities_at(model, rows_of(test), answers).double().numpy()


SYSTEMS = {"streams": run_streams, "instruction": run_instruction}


def trained(trainer: transformers.Trainer, clock: StepClock, settings: dict, tokens: int) -> dict:
    """Train; seconds, steps and passes that it took, and tokens of a pass."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return {"seconds": clock.seconds, "steps": clock.steps, "passes": settings["num_train_epochs"],
            "tokens_of_a_pass": tokens}  # fmt: skip


def prompts_of(windows: StreamSubset) -> tuple[list[list[int]], list[int]]:
    """Token ids of a prompt that ends where the answer follows, and the class number, of each target of the windows."""
    numbers = numbers_of(windows)
    prompts = TargetPrompts(windows.parent, numbers).prompts
    ids = [prompt.input_ids[: prompt.markers[0] + 1].tolist() for prompt in prompts]
    return ids, windows.parent.target_labels[numbers].tolist()


def rows_of(test: StreamSubset) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and places of the answers, in the order of targets: a row a window, or one a target of it if it has
    probes, which the stock model would read as one text.
    """
    rows = []
    for number in range(len(test)):
        stream = test[number]
        parts = [stream]
        if (stream.segment > 0).any():
            no_suffix = np.empty(0, stream.input_ids.dtype)
            parts = [stream.independent(one, no_suffix) for one in range(len(stream.targets))]
        rows += [(part.input_ids, part.markers) for part in parts]
    return rows


# -- what is stated --------------------------------------------------------------------------------------------------


def newest(streams: SplitStreams, test: StreamSubset, samples: int) -> dict:
    """The user's newest rate as the answer to the same targets."""
    points, numbers = Points.of(streams.test), numbers_of(test)
    counts = CountFeatures(streams.log, streams.test.domain, streams.splits.train.rows, streams.test.domain.split.by)
    p = 1 / (1 + np.exp(-counts.frame(points)["newest_rate"].to_numpy()[numbers]))
    users = points.users[numbers]
    return plain_intervals(
        intervals(METRICS, points.labels[numbers], np.column_stack([1 - p, p]), users, samples=samples)
    )


def summary(runs: list[dict]) -> dict:
    """Median, least and greatest of each metric over the seeds."""
    return {name: spread([run["metrics"][name]["value"] for run in runs]) for name in METRICS}


def show(result: dict) -> None:
    """Print the medians and spreads."""
    print(f"{result['log']}: {result['test']['targets']} test targets of {result['test']['users']} users")
    lines = [(f"{name}, {targets} targets", values) for name, sizes in result["summary"].items()
             for targets, values in sizes.items()]  # fmt: skip
    lines += [(f"streams - instruction, {targets} targets", values)
              for targets, values in result["streams_minus_instruction"]["summary"].items()]  # fmt: skip
    for title, values in lines:
        cells = (f"{name} {values[name]['median']:.3f} ({values[name]['min']:.3f} to {values[name]['max']:.3f})"
                 for name in METRICS)  # fmt: skip
        print(f"{title}: {', '.join(cells)}")
    print("newest rate: " + ", ".join(f"{name} {v['value']:.3f}" for name, v in result["newest_rate"].items()))


if __name__ == "__main__":
    main()
