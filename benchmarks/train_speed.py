"""Training speed on streams beside the plain way (peers/plain.py), on the same targets in one run.

    python -m llmrec_peft.data.download ml-latest-small
    python benchmarks/train_speed.py [--data DIR] [--rounds 3] [--peer-targets 8]

Both train the same LoRA on the same base in float32, in turns: stream, plain, stream, plain, ... Every round draws new
windows of the training split; the plain side trains on `--peer-targets` of their targets, spread evenly over their
lengths (0: on all of them, which takes long). Before any step both must give equal answers on equal targets.

Share of the machine's rate: tokens/s * FLOPs a token / the best torch.mm rate of the same round. The frozen weights
(N, embeddings left out) need the forward and the backward pass to their inputs, 2 N each; what trains (A) needs the
backward pass to its weights too: 4 N + 6 A a token. Attention scores and padding are work too, but count as none.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from measuring import cell, header, matmul_rate, memory_mib, quiet, reset_peak, spread, stop, write_result
from peers.plain import PromptDataset, StepClock, load_plain, plain_logits, plain_trainer

from llmrec_peft.config.schema import DataConfig
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.download import default_directory
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import IndependentPrompts, StreamDataset, StreamSubset
from llmrec_peft.errors import LLMRecError
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.models.classifier import BehaviorClassifier, load_classifier
from llmrec_peft.models.predict import predict
from llmrec_peft.runs.split_streams import SIMULATED_SHOP, build_split_streams
from llmrec_peft.runs.split_streams import read_log as read_named_log
from llmrec_peft.training.trainer import BehaviorTrainer

ROOT = Path(__file__).resolve().parent
CONFIG = ROOT.parent / "recipes" / "configs" / "movies"
TOLERANCE = 1e-4  # of logits, between the stream's answers and the plain prompts'


class Cells:
    """Counts positions that a model computes, padding included, at its embedding."""

    def __init__(self, model: torch.nn.Module):
        self.count = 0
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, module, inputs, output) -> None:
        self.count += inputs[0].numel()


class StreamSide:
    """The package: windows through BehaviorTrainer."""

    def __init__(self, classifier: BehaviorClassifier, options: argparse.Namespace, scratch: str):
        self.classifier, self.options, self.scratch = classifier, options, scratch
        self.cells = Cells(classifier.stock)

    def train(self, windows: StreamSubset, steps: int) -> dict[str, float]:
        """Train one epoch of `windows` in `steps` steps."""
        arguments = transformers.TrainingArguments(
            output_dir=self.scratch, num_train_epochs=1, per_device_train_batch_size=-(-len(windows) // steps),
            learning_rate=self.options.learning_rate, lr_scheduler_type="constant", save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, seed=self.options.seed,
        )  # fmt: skip
        clock = StepClock()
        trainer = BehaviorTrainer(
            self.classifier, arguments, windows, tokenizer=self.classifier.tokenizer,
            micro_tokens=self.options.micro_tokens, callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        return _timed(trainer, clock, self.cells, targets_of(windows), int(windows.lengths.sum()))


class PlainSide:
    """The peer: a prompt a target through the stock Trainer."""

    def __init__(self, model, tokenizer, options: argparse.Namespace, scratch: str):
        self.model, self.tokenizer, self.options, self.scratch = model, tokenizer, options, scratch
        self.cells = Cells(model)
        self.batch_size = 1

    def prompts(self, windows: StreamSubset, numbers: np.ndarray) -> PromptDataset:
        """Targets of `windows`, by their numbers within it, as texts with all of their history."""
        independent = IndependentPrompts(windows)
        chosen = [independent[int(number)] for number in numbers]
        inner = [_inside(prompt.input_ids, independent.parent.vocabulary) for prompt in chosen]
        texts = self.tokenizer.batch_decode(inner, clean_up_tokenization_spaces=False)
        prompts = PromptDataset(texts, [int(prompt.labels[0]) for prompt in chosen], self.tokenizer)
        for row, prompt in zip(prompts.rows, chosen, strict=True):
            if row["input_ids"] != prompt.input_ids.tolist():
                stop("a prompt's text does not give the stream's tokens again; use a base with a byte-level tokenizer")
        return prompts

    def train(self, prompts: PromptDataset, steps: int) -> dict[str, float]:
        """Train one epoch of `prompts` in about `steps` steps."""
        accumulation = max(1, len(prompts) // (steps * self.batch_size))
        trainer, clock = plain_trainer(
            self.model, self.tokenizer, prompts, self.scratch, batch_size=self.batch_size, accumulation=accumulation,
            learning_rate=self.options.learning_rate, seed=self.options.seed,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        return _timed(trainer, clock, self.cells, len(prompts), sum(prompts.lengths))


def _timed(trainer: transformers.Trainer, clock: StepClock, cells: Cells, targets: int, tokens: int) -> dict:
    reset_peak()
    before = cells.count
    trainer.train()
    computed = cells.count - before
    return {
        "targets": targets,
        "tokens": tokens,
        "computed_tokens": computed,
        "steps": clock.steps,
        "seconds": clock.seconds,
        "targets_per_s": targets / clock.seconds,
        "tokens_per_s": tokens / clock.seconds,
        "tokens_per_target": tokens / targets,
        "padding": 1 - tokens / computed,
        "peak_rss_mib": memory_mib(),
    }


def _inside(ids: np.ndarray, vocabulary) -> list[int]:
    """Tokens without what the tokenizer itself puts around a text."""
    return ids[len(vocabulary.prefix) : len(ids) - len(vocabulary.suffix)].tolist()


def targets_of(windows: StreamSubset) -> int:
    """Targets in a subset of windows."""
    return int(np.diff(windows.parent.target_offsets)[windows.windows].sum())


def spread_over_lengths(windows: StreamSubset, count: int) -> np.ndarray:
    """Numbers of `count` targets at even steps of the order by prompt length; all for 0."""
    independent = IndependentPrompts(windows)
    if not 0 < count < len(independent):
        return np.arange(len(independent))
    # A prompt ends with its marker and the tokenizer's suffix, so the markers tell the order of lengths.
    lengths = np.concatenate([[stream.independent(i, np.empty(0, np.int32)).input_ids.size
                               for i in range(len(stream.labels))]
                              for stream in (windows[n] for n in range(len(windows)))])  # fmt: skip
    order = np.argsort(lengths, kind="stable")
    return order[((np.arange(count) + 0.5) * len(order) / count).astype(int)]


def draw_rounds(train: StreamDataset, rounds: int, windows: int, seed: int) -> list[StreamSubset]:
    """Windows of each round; the first entry is for warming up and for the answers.

    Windows differ in how many targets share a history, and so in tokens a target. Each round takes one window at random
    out of each of `windows` equal parts of the order by targets, so that it stands for the whole split.
    """
    needed = (rounds + 1) * windows
    if len(train) < needed:
        stop(f"{rounds} rounds and a warm-up need {needed} windows, and the log has {len(train)}; ask for fewer")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    order = order[np.argsort(np.diff(train.target_offsets)[order], kind="stable")]
    picked = np.stack([rng.choice(part, rounds + 1, replace=False) for part in np.array_split(order, windows)])
    return [StreamSubset(train, np.sort(column)) for column in picked.T]


def check_answers(stream: StreamSide, plain: PlainSide, windows: StreamSubset, count: int) -> float:
    """Greatest difference of logits on the same targets, both sides untrained; ends the run if it is too large."""
    with torch.no_grad():
        plain.model.get_base_model().score.weight.copy_(stream.classifier.head.weight)
    counts = [sum(p.numel() for p in side.parameters() if p.requires_grad) for side in (stream.classifier, plain.model)]
    if counts[0] != counts[1]:
        stop(f"the two sides train {counts[0]:,} and {counts[1]:,} parameters; they must be the same")
    numbers = spread_over_lengths(windows, count)
    pad = stream.classifier.tokenizer.pad_token_id
    found = predict(stream.classifier, windows, StreamCollator(pad, 4000), batch_tokens=4000)
    wanted = np.concatenate([windows[number].targets for number in range(len(windows))])[numbers]
    ours = found.logits[np.searchsorted(found.targets, wanted)]
    theirs = plain_logits(plain.model, plain.tokenizer, plain.prompts(windows, numbers)).numpy()
    difference = float(np.abs(ours - theirs).max())
    if not difference <= TOLERANCE:
        stop(f"logits on the same targets differ by {difference:.2g}, more than {TOLERANCE:g}; the sides are not equal")
    return difference


def choose_batch_size(plain: PlainSide, windows: StreamSubset, sizes: list[int]) -> dict[int, float]:
    """Targets/s of the plain side at each batch size, on the same prompts; sets the fastest."""
    prompts = plain.prompts(windows, spread_over_lengths(windows, max(sizes)))
    plain.train(plain.prompts(windows, spread_over_lengths(windows, 1)), 1)  # warms up
    speeds = {}
    for size in sizes:
        plain.batch_size = size
        speeds[size] = plain.train(prompts, 1)["targets_per_s"]
    plain.batch_size = max(speeds, key=speeds.get)
    return speeds


def flops_per_token(classifier: BehaviorClassifier) -> dict[str, float]:
    """N, A and 4 N + 6 A; see the top of the file."""
    trainable, total = classifier.trainable_parameters()
    frozen_head = sum(p.numel() for p in classifier.head.parameters() if not p.requires_grad)
    embeddings = sum(p.numel() for p in classifier.stock.get_input_embeddings().parameters())
    base = total - trainable - embeddings - frozen_head
    return {"base_parameters": base, "trained_parameters": trainable, "flops_per_token": 4 * base + 6 * trainable}


def read_log(data: str | None) -> BehaviorLog:
    """The log in a directory, or `simulated:shop`; by default MovieLens where the downloader puts it. Ends the run if
    it is not there."""
    path = data or str(default_directory() / "ml-latest-small")
    if path != SIMULATED_SHOP and not Path(path).is_dir():
        stop(
            f"{path} is no directory; fetch the log with: python -m llmrec_peft.data.download ml-latest-small, "
            f"or name one with --data"
        )
    return read_named_log(DataConfig(path=path))


def run(options: argparse.Namespace, scratch: str) -> dict:
    """All rounds, and what they come to."""
    log = read_log(options.data)
    domain = Domain.from_yaml(options.domain)
    base = resolve_base(options.base)
    train = build_split_streams(log, domain, load_tokenizer(base)).train
    rounds = draw_rounds(train, options.rounds, options.steps * options.batch_size, options.seed)
    torch.manual_seed(options.seed)
    stream = StreamSide(load_classifier(base, domain, "lora", r=16, alpha=32), options, scratch)
    plain = PlainSide(*load_plain(base, len(domain.labels), seed=options.seed), options, scratch)
    loaded = memory_mib("VmRSS")
    difference = check_answers(stream, plain, rounds[0], options.peer_targets)
    print(f"answers: equal on the same targets (logits differ by at most {difference:.1e})", flush=True)
    stream.train(StreamSubset(train, rounds[0].windows[:1]), 1)  # warms up
    speeds = choose_batch_size(plain, rounds[0], options.peer_batch_sizes)
    shown = ", ".join(f"{size}: {speed:.3f}" for size, speed in speeds.items())
    print(f"plain: targets/s by batch size {shown}; taking {plain.batch_size}", flush=True)
    measured = []
    for number, windows in enumerate(rounds[1:], 1):
        rates = matmul_rate(options.matmul_sizes)
        ours = stream.train(windows, options.steps)
        theirs = plain.train(plain.prompts(windows, spread_over_lengths(windows, options.peer_targets)), options.steps)
        ratio = ours["targets_per_s"] / theirs["targets_per_s"]
        measured.append({"stream": ours, "plain": theirs, "ratio": ratio, "matmul_flops_per_s": rates})
        print(f"round {number}: stream {ours['targets_per_s']:.3f} targets/s, plain {theirs['targets_per_s']:.3f}, "
              f"ratio {ratio:.1f}", flush=True)  # fmt: skip
    counts = flops_per_token(stream.classifier)
    return {
        "log": {"interactions": len(log), "users": log.num_users},
        "split": {
            "windows": len(train),
            "targets": train.num_targets,
            "tokens_per_target": int(train.lengths.sum()) / train.num_targets,
        },
        "domain": domain.to_dict(),
        "answers_max_difference": difference,
        "plain_batch_size": {"chosen": plain.batch_size, "targets_per_s": speeds},
        "rss_loaded_mib": loaded,
        **counts,
        "summary": summarise(measured, counts["flops_per_token"]),
        "rounds": measured,
    }


def summarise(rounds: list[dict], flops: float) -> dict:
    """Medians and spreads over the rounds."""
    best = [max(entry["matmul_flops_per_s"].values()) for entry in rounds]
    summary = {"ratio": spread([entry["ratio"] for entry in rounds]), "matmul_flops_per_s": spread(best)}
    for side in ("stream", "plain"):
        parts = [entry[side] for entry in rounds]
        summary[side] = {
            key: spread([part[key] for part in parts])
            for key in ("targets_per_s", "tokens_per_s", "tokens_per_target", "padding", "peak_rss_mib")
            if parts[0][key] is not None
        }
        shares = [part["tokens_per_s"] * flops / rate for part, rate in zip(parts, best, strict=True)]
        summary[side]["matmul_share"] = spread(shares)
    return summary


ROWS = (
    ("targets/s", "targets_per_s", "{:.3f}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("tokens a target", "tokens_per_target", "{:.1f}"),
    ("padding", "padding", "{:.1%}"),
    ("share of torch.mm", "matmul_share", "{:.1%}"),
    ("peak memory, MiB", "peak_rss_mib", "{:.0f}"),
)


def table(summary: dict) -> str:
    """The summary as text: medians with (least to greatest)."""

    lines = [f"{'':20}{'stream':32}plain"]
    for name, key, form in ROWS:
        lines.append(f"{name:20}{cell(summary['stream'].get(key), form):32}{cell(summary['plain'].get(key), form)}")
    lines.append(f"{'stream / plain':20}{cell(summary['ratio'], '{:.1f}')}")
    rate = {key: value / 1e9 for key, value in summary["matmul_flops_per_s"].items()}
    lines.append(f"{'torch.mm, GFLOP/s':20}{cell(rate, '{:.0f}')}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; the batch is the recipe's."""
    recipe = yaml.safe_load((CONFIG / "lora.yaml").read_text())["train"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="directory of a MovieLens log; default: where the downloader puts it")
    parser.add_argument("--domain", default=str(CONFIG / "domain.yaml"), help="domain file")
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each side takes")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a turn")
    parser.add_argument("--batch-size", type=int, default=recipe["batch_size"], help="windows of a step")
    parser.add_argument("--micro-tokens", type=int, default=recipe["micro_tokens"], help="tokens of a micro-batch")
    parser.add_argument("--peer-targets", type=int, default=8, help="targets of a turn of the plain side; 0: all")
    parser.add_argument("--peer-batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="the fastest is taken")
    parser.add_argument("--matmul-sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="torch.mm sizes")
    parser.add_argument("--learning-rate", type=float, default=recipe["learning_rate"])
    parser.add_argument("--seed", type=int, default=0, help="of windows, adapters and order")
    parser.add_argument("--output", default=str(ROOT / "results" / "train_speed.json"), help="result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print the table and write the result; returns it."""
    options = parse(arguments)
    try:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            result = run(options, scratch)
    except LLMRecError as error:
        stop(str(error))
    print(table(result["summary"]))
    result = {**header(__file__, sys.argv[1:] if arguments is None else arguments, options.seed), **result}
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "domain", "base", "output")}
    write_result(options.output, {"settings": settings, **result})
    return result


if __name__ == "__main__":
    main()
