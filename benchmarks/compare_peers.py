"""The package beside what a user would pick instead: quality against training time, speed and memory.

    python benchmarks/compare_peers.py --data DIR [--seconds 600] [--swift-env DIR]
    python benchmarks/compare_peers.py --data DIR --seconds 40 --points 2 --validation 60 --context 4 --targets 4

The second form is the quick one, under five minutes on 2 cores. The systems: `streams` is the package; `plain` is the
stock Trainer with PEFT's sequence classification; `instruction` is TALLRec's way (peers/instruction.py); with
`--swift-env`, `swift` is ms-swift's sequence classification in an environment of its own (peers/swift.py).

All train LoRA of one rank on all linear layers of the same base in float32, with the same learning rate (constant,
AdamW), on the targets of the same training windows, and answer the same validation targets, drawn once and spread over
users. Streams take whole windows; the peers take one prompt a target, with the same history, all in the same batches of
like length. Each starts as it does by default: streams' head from the label words, that of plain and swift at random.

Each runs in a process of its own, and trains for `--seconds`; set-up and evaluation do not count, the first steps do.
swift trains as many steps as plain came to, and its time is its own log's (see peers/swift.py). Tokens a target are
positions computed in training, padding included. Peak memory is the whole process's, loading included.

AUC between two points of a curve is taken to run straight. Brackets are 95 % bootstrap intervals over users.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from measuring import header, quiet, stop, write_result
from peers.curves import side_by_side
from peers.streams import TargetPrompts, read_domain, read_splits

from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.data.vocabulary import special_tokens_around
from llmrec_peft.errors import LLMRecError
from llmrec_peft.evaluation.bootstrap import differences, intervals
from llmrec_peft.models.base import resolve_base
from llmrec_peft.runs.split_streams import SplitStreams

ROOT = Path(__file__).resolve().parent
CONFIG = ROOT.parent / "recipes" / "configs" / "movies"
# The peers first: streams then answer once more at the number of targets that the slowest of them came to.
SYSTEMS = ("plain", "instruction", "swift", "streams")
METRICS = ("auc", "logloss")
MEGABATCH = 50  # batches that are sorted by length together, as Transformers' group_by_length does


def draw_validation(streams: StreamDataset, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` targets at random, in turns over the users, so that they come from as many as there are."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(streams.num_targets)
    users = streams.log.user_codes[streams.target_rows[order]]
    by_user = np.argsort(users, kind="stable")
    counts = np.bincount(users)
    turns = np.empty(len(order), np.int64)
    turns[by_user] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort(turns, kind="stable")][:count]


def draw_pool(streams: StreamDataset, targets: int, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows at random that hold about so many targets, and these targets' numbers in random order, whole batches."""
    windows = getattr(streams.limited(targets, seed), "windows", np.arange(len(streams)))
    offsets = streams.target_offsets
    numbers = np.concatenate([np.arange(offsets[window], offsets[window + 1]) for window in windows])
    numbers = np.random.default_rng(seed).permutation(numbers)
    return windows, numbers[: len(numbers) // batch * batch]


def batch_order(lengths: np.ndarray, batch: int, seed: int) -> np.ndarray:
    """An order of rows in which batches are of like length and follow each other at random."""
    rng, size = np.random.default_rng(seed), MEGABATCH * batch
    batches = []
    for start in range(0, len(lengths), size):
        rows = np.arange(start, min(start + size, len(lengths)))
        rows = rows[np.argsort(-lengths[rows], kind="stable")].reshape(-1, batch)
        batches.append(rng.permutation(rows))
    return np.concatenate(batches).reshape(-1)


def write_prompts(path: Path, streams: StreamDataset, numbers: np.ndarray, prompts: TargetPrompts) -> int:
    """Write prompts as texts with their labels; returns how many do not give the stream's very tokens again."""
    tokenizer = streams.vocabulary.tokenizer
    before, after = special_tokens_around(tokenizer)
    inner = [prompt.input_ids[len(before) : prompt.input_ids.size - len(after)].tolist() for prompt in prompts.prompts]
    texts = tokenizer.batch_decode(inner, clean_up_tokenization_spaces=False)
    labels = streams.target_labels[numbers].tolist()
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum(ids != wanted for ids, wanted in zip(again, inner, strict=True))


def prepare(options: argparse.Namespace, place: Path) -> tuple[dict, dict, SplitStreams]:
    """Draw what all systems share and write it down; the job, what to state of it, and the streams."""
    domain = read_domain(options.domain, options.context, options.targets)
    job = {
        key: getattr(options, key)
        for key in ("data", "seconds", "steps", "points", "r", "alpha", "learning_rate", "seed", "batch_size",
                    "micro_tokens", "peer_batch", "peer_accumulation", "evaluation_batch")
    }  # fmt: skip
    job |= {"base": resolve_base(options.base), "domain": domain.to_dict(), "words": list(domain.outcomes.values())}
    splits = read_splits(job)
    validation = draw_validation(splits.valid, options.validation, options.seed)
    found = TargetPrompts(splits.valid, validation)
    # Longest first, so that batches of the evaluation hold prompts of like length.
    order = np.argsort(-found.lengths, kind="stable")
    validation, found = validation[order], TargetPrompts(splits.valid, validation[order])
    labels = splits.valid.target_labels[validation]
    if len(np.unique(labels)) < 2:
        stop(f"{len(labels)} validation targets all have one label, and AUC needs both; raise --validation")
    windows, numbers = draw_pool(splits.train, options.pool, options.peer_batch, options.seed)
    if not len(numbers):
        stop(f"--pool {options.pool}: the training windows hold less than one batch of {options.peer_batch} targets")
    prompts = TargetPrompts(splits.train, numbers)
    numbers = numbers[batch_order(prompts.lengths, options.peer_batch, options.seed)]
    prompts = TargetPrompts(splits.train, numbers)
    other = [
        write_prompts(place / "train.jsonl", splits.train, numbers, prompts),
        write_prompts(place / "valid.jsonl", splits.valid, validation, found),
    ]
    job |= {"validation": validation.tolist(), "windows": windows.tolist()}
    users = splits.log.user_codes[splits.valid.target_rows[validation]]
    stated = {
        "log": {"interactions": len(splits.log), "users": splits.log.num_users},
        "domain": job["domain"],
        "training": {
            "windows": len(windows),
            "targets": len(numbers),
            "tokens_per_target_in_windows": int(splits.train.lengths[windows].sum())
            / int(np.diff(splits.train.target_offsets)[windows].sum()),
            "prompt_tokens": float(prompts.lengths.mean()),
            "prompts_of_other_tokens": other[0],
        },
        "validation": {
            "targets": len(validation),
            "users": len(np.unique(users)),
            "share_of_last_label": float((labels == labels.max()).mean()),
            "prompt_tokens": float(found.lengths.mean()),
            "prompts_of_other_tokens": other[1],
        },
    }
    return job, stated, splits


def run_system(name: str, job: dict, place: Path) -> tuple[dict, np.ndarray]:
    """Train one system in a process of its own; what it measured, and its answers [points, targets, labels]."""
    (place / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "peers.worker", name, str(place)], env=environment, check=False)
    if done.returncode:
        stop(f"{name} ended with exit code {done.returncode}; its own message is above")
    return json.loads((place / f"{name}.json").read_text()), np.load(place / f"{name}.npy")


def with_quality(measured: dict, answers: np.ndarray, labels: np.ndarray, users: np.ndarray, draw: dict) -> dict:
    """A system's measurements with AUC, logloss and AUC's interval at each point of its curve, and its speed."""
    curve = []
    for point, probabilities in zip(measured["curve"], answers, strict=True):
        found = intervals(METRICS, labels, probabilities, users, **draw)
        curve.append({**point, **{name: found[name].value for name in METRICS}, "auc_interval": _ends(found["auc"])})
    end = curve[-1]
    speed = {"targets": end["targets"], "steps": end["steps"], "seconds": end["seconds"],
             "targets_per_s": end["targets"] / end["seconds"]}  # fmt: skip
    return {**speed, **measured, "curve": curve}


def _ends(found) -> list[float] | None:
    return [found.low, found.high] if np.isfinite([found.low, found.high]).all() else None


def run(options: argparse.Namespace, place: Path) -> dict:
    """All systems, one after another, and their curves side by side."""
    if not any(name == "plain" for name in options.systems) and "swift" in options.systems:
        stop("swift trains as many steps as plain came to; add plain to --systems")
    job, stated, splits = prepare(options, place)
    wanted = np.array(job["validation"])
    labels, users = splits.valid.target_labels[wanted], splits.log.user_codes[splits.valid.target_rows[wanted]]
    draw = {"samples": options.bootstrap, "seed": options.seed}
    systems, last = {}, {}
    for name in (name for name in SYSTEMS if name in options.systems):
        job["at_targets"] = min((entry["targets"] for entry in systems.values()), default=None)
        job["swift"] = {"environment": options.swift_env, "steps": systems.get("plain", {}).get("steps")}
        measured, answers = run_system(name, job, place)
        systems[name], last[name] = with_quality(measured, answers, labels, users, draw), answers[-1]
        print(f"{name}: {systems[name]['targets']} targets in {systems[name]['seconds']:.1f} s of training, "
              f"validation AUC {systems[name]['curve'][-1]['auc']:.3f}", flush=True)  # fmt: skip
    compared = side_by_side({name: entry["curve"] for name, entry in systems.items()}, options.auc)
    for name, entry in systems.items():
        entry |= compared["systems"][name]
        if name != "streams" and "streams" in systems:
            found = differences(METRICS, labels, last[name], last["streams"], users, **draw)
            entry["streams_minus_this_at_the_end"] = {
                key: {"value": value.value, "interval": _ends(value)} for key, value in found.items()
            }
    equal = {key: compared[key] for key in ("seconds", "targets", "auc")}
    return {**stated, "compared_at": equal, "systems": systems}


def table(result: dict) -> str:
    """What was measured, one line a system."""
    at = result["compared_at"]
    heads = ("", "targets/s", "tokens/target", "peak MiB", "targets", "AUC at the end", f"at {at['seconds']:.0f} s",
             f"at {at['targets']} targets", f"s to {at['auc']:.2f}")  # fmt: skip
    rows = [heads]
    for name, entry in result["systems"].items():
        end = entry["curve"][-1]
        low, high = end["auc_interval"] or (float("nan"), float("nan"))
        reached = entry["seconds_to_auc"]
        rows.append(
            (name, f"{entry['targets_per_s']:.2f}", f"{entry['tokens_per_target']:.1f}",
             _cell(entry["peak_rss_mib"], "{:.0f}"), str(entry["targets"]),
             f"{end['auc']:.3f} [{low:.3f}, {high:.3f}]", _cell(entry["auc_at_equal_seconds"], "{:.3f}"),
             _cell(entry["auc_at_equal_targets"], "{:.3f}"),
             "not reached" if reached is None else f"{reached:.0f}")
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    found, training = result["validation"], result["training"]
    lines.append(f"validation: {found['targets']} targets of {found['users']} users; prompts of "
                 f"{training['prompt_tokens']:.0f} tokens in the mean")  # fmt: skip
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "not known" if value is None else form.format(value)


def plot(result: dict, path: Path) -> None:
    """Validation AUC against training seconds, one line a system, with the interval of its last point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"streams": "#1f5fa8", "plain": "#d1661c", "instruction": "#3b8a4f", "swift": "#7d4ea8"}
    for name in reversed(SYSTEMS):
        if name not in result["systems"]:
            continue
        entry = result["systems"][name]
        curve, end = entry["curve"], entry["curve"][-1]
        label = f"{name} ({entry['targets_per_s']:.2g} targets/s)"
        axes.plot(
            [p["seconds"] for p in curve], [p["auc"] for p in curve], "o-", ms=4, color=colours[name], label=label
        )
        if end["auc_interval"]:
            low, high = end["auc_interval"]
            axes.errorbar(end["seconds"], end["auc"], [[end["auc"] - low], [high - end["auc"]]], capsize=3,
                          color=colours[name], alpha=0.6)  # fmt: skip
    aim = result["compared_at"]["auc"]
    axes.axhline(aim, color="#8a8a8a", lw=0.8, ls=":")
    axes.annotate(f"AUC {aim:.2f}", (1, aim), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8,
                  color="#5a5a5a")  # fmt: skip
    axes.set_xlabel("seconds of training (set-up and evaluation left out)")
    axes.set_ylabel(f"AUC on {result['validation']['targets']} validation targets")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.savefig(path, dpi=130)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; the batch of streams is the recipe's."""
    recipe = yaml.safe_load((CONFIG / "lora.yaml").read_text())
    train, method = recipe["train"], recipe["method"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="directory of the log")
    parser.add_argument("--domain", default=str(CONFIG / "domain.yaml"), help="domain file")
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all; swift with --swift-env alone")
    parser.add_argument("--swift-env", help="directory of ms-swift's environment, made where it is not there")
    parser.add_argument("--seconds", type=float, default=600, help="training time of each system")
    parser.add_argument("--steps", type=int, help="end a system earlier, after so many steps")
    parser.add_argument("--points", type=int, default=6, help="evaluations of a curve after the one at its start")
    parser.add_argument("--validation", type=int, default=150, help="validation targets")
    parser.add_argument("--pool", type=int, default=4000, help="training targets to choose from, at least")
    parser.add_argument("--context", type=int, help="history events before a window's targets; default: the domain's")
    parser.add_argument("--targets", type=int, help="targets of a window; default: the domain's")
    parser.add_argument("--batch-size", type=int, default=train["batch_size"], help="windows of a step of streams")
    parser.add_argument("--micro-tokens", type=int, default=train["micro_tokens"], help="the same in tokens, at a time")
    parser.add_argument("--peer-batch", type=int, default=8, help="targets of a step of the peers")
    parser.add_argument("--peer-accumulation", type=int, default=1, help="parts that such a step is computed in")
    parser.add_argument("--evaluation-batch", type=int, default=4, help="prompts that the peers answer at a time")
    parser.add_argument("--learning-rate", type=float, default=train["learning_rate"])
    parser.add_argument("--r", type=int, default=method["r"], help="rank of LoRA")
    parser.add_argument("--alpha", type=int, default=method["alpha"], help="alpha of LoRA")
    parser.add_argument("--auc", type=float, default=0.8, help="validation AUC whose time is asked for")
    parser.add_argument("--bootstrap", type=int, default=1000, help="samples of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, adapters and order")
    parser.add_argument(
        "--output", default=str(ROOT / "results" / "peers.json"), help="result file; its plot beside it"
    )
    options = parser.parse_args(arguments)
    if options.systems is None:
        options.systems = [name for name in SYSTEMS if name != "swift" or options.swift_env]
    if "swift" in options.systems and not options.swift_env:
        parser.error("swift needs --swift-env, the directory of its environment")
    if options.peer_batch % options.peer_accumulation:
        parser.error(f"--peer-batch {options.peer_batch} must be a multiple of --peer-accumulation")
    for name in ("seconds", "points", "validation", "pool", "peer_batch", "peer_accumulation", "evaluation_batch"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print the table, write the result and its plot; returns the result."""
    options = parse(arguments)
    try:
        with quiet(), tempfile.TemporaryDirectory() as place:
            result = run(options, Path(place))
    except LLMRecError as error:
        stop(str(error))
    print(table(result))
    settings = {key: value for key, value in vars(options).items()
                if key not in ("data", "domain", "swift_env", "output")}  # fmt: skip
    given = sys.argv[1:] if arguments is None else arguments
    given = [Path(word).name if word == options.swift_env else word for word in given]
    started = header(__file__, given, options.seed)
    result = {"settings": settings, **started, **result}
    write_result(options.output, result)
    plot(result, Path(options.output).with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
