"""Speed of a training step on streams.

    python -m benchmarks.train_speed compare --data DIR [--rounds 3] [--peer-targets 8]
    python -m benchmarks.train_speed profile --data DIR [--tokens 1024] [--rounds 5]
    python -m benchmarks.train_speed curves --data DIR [--rounds 3] [--curves context rank]

All train LoRA of rank 16 on all linear layers in float32.

compare: streams beside a plain Trainer (quality/peers/plain.py) in turns, on the same targets, with equal predictions
before any step. Each round draws new windows; the plain side trains on --peer-targets of their targets, spread evenly
over prompt lengths.

profile: one micro-batch forward and backward, in turns with torch.mm, and once under PyTorch's profiler. A window with
candidates is also timed under one dense mask, which is what Transformers would do with it.

curves: see cost_curves.py.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import training
from benchmarks.cost_curves import CURVES_BENCHMARK, TRAINING
from benchmarks.measuring import RECIPE, Benchmark, in_turns, memory_mib, ratios, read_streams, run, spread, stop
from benchmarks.quality.peers.plain import PromptDataset, load_plain, plain_logits, plain_trainer
from benchmarks.quality.peers.streams import texts_of
from benchmarks.training import RANK, PositionCounter, matmul_rate, train_streams
from llmrec_peft import load_classifier
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.streams import IndependentPrompts, StreamDataset, StreamSubset
from llmrec_peft.models import attention
from llmrec_peft.models.base import resolve_base
from llmrec_peft.models.predict import predict

TOLERANCE = 1e-4  # of logits, between both sides


# -- compare ---------------------------------------------------------------------------------------


def spread_over_lengths(windows: StreamSubset, count: int) -> np.ndarray:
    """Numbers of `count` targets at even steps of the order by prompt length; all if there are no more."""
    prompts = IndependentPrompts(windows)
    if count >= len(prompts):
        return np.arange(len(prompts))
    order = np.argsort([len(prompts[number].input_ids) for number in range(len(prompts))], kind="stable")
    return order[((np.arange(count) + 0.5) * len(order) / count).astype(int)]


def draw_rounds(train: StreamDataset, rounds: int, windows: int, seed: int) -> list[StreamSubset]:
    """Windows of each round; the first entry is for warming up.

    Windows differ in how many targets share a history. Each round takes one window at random out of each of `windows`
    equal parts of the order by targets, so that it stands for the whole split.
    """
    needed = (rounds + 1) * windows
    if len(train) < needed:
        stop(f"{rounds} rounds and a warm-up need {needed} windows, and the log has {len(train)}; ask for fewer")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    order = order[np.argsort(np.diff(train.target_offsets)[order], kind="stable")]
    picked = np.stack([rng.choice(part, rounds + 1, replace=False) for part in np.array_split(order, windows)])
    return [StreamSubset(train, np.sort(column)) for column in picked.T]


class PlainSide:
    """The peer: a prompt a target through the stock Trainer."""

    def __init__(self, base: str, labels: int, options: argparse.Namespace, scratch: Path) -> None:
        self.model, self.tokenizer = load_plain(base, labels, seed=options.seed)
        self.options, self.scratch, self.batch_size = options, scratch, 1
        self.counter = PositionCounter(self.model)

    def prompts(self, windows: StreamSubset, numbers: np.ndarray) -> PromptDataset:
        """Targets of `windows`, by their numbers within it, as texts with all of their history."""
        prompts = IndependentPrompts(windows)
        chosen = [prompts[int(number)] for number in numbers]
        texts = texts_of(windows.parent.vocabulary, chosen)
        found = PromptDataset(texts, [int(prompt.labels[0]) for prompt in chosen], self.tokenizer)
        if any(row["input_ids"] != prompt.input_ids.tolist() for row, prompt in zip(found.rows, chosen, strict=True)):
            stop("a prompt's text does not give the stream's tokens again; use a base with a byte-level tokenizer")
        return found

    def train(self, prompts: PromptDataset, steps: int) -> dict:
        """One epoch of `prompts` in about `steps` steps."""
        trainer, clock = plain_trainer(
            self.model, self.tokenizer, prompts, self.scratch, batch_size=self.batch_size, seed=self.options.seed,
            accumulation=max(1, len(prompts) // (steps * self.batch_size)), learning_rate=self.options.learning_rate,
        )  # fmt: skip
        return training.train_timed(trainer, clock, self.counter, len(prompts), sum(prompts.lengths))


def check_equal(classifier, plain: PlainSide, windows: StreamSubset, count: int) -> float:
    """Greatest difference of untrained logits on the same targets; ends the run if the sides differ."""
    with torch.no_grad():
        plain.model.get_base_model().score.weight.copy_(classifier.head.weight)
    counts = [sum(p.numel() for p in side.parameters() if p.requires_grad) for side in (classifier, plain.model)]
    if counts[0] != counts[1]:
        stop(f"the two sides train {counts[0]:,} and {counts[1]:,} parameters; they must be the same")
    numbers = spread_over_lengths(windows, count)
    found = predict(classifier, windows, StreamCollator(classifier.tokenizer.pad_token_id, 4000), batch_tokens=4000)
    wanted = np.concatenate([windows[number].targets for number in range(len(windows))])[numbers]
    theirs = plain_logits(plain.model, plain.tokenizer, plain.prompts(windows, numbers)).numpy()
    difference = float(np.abs(found.logits[np.searchsorted(found.targets, wanted)] - theirs).max())
    if not difference <= TOLERANCE:
        stop(f"logits on the same targets differ by {difference:.2g}, more than {TOLERANCE:g}; the sides are not equal")
    return difference


def compare(options: argparse.Namespace, scratch: Path) -> dict:
    """Streams beside a plain Trainer with PEFT, on the same targets."""
    streams, base = read_streams(options), resolve_base(options.base)
    train = streams.train
    rounds = draw_rounds(train, options.rounds, options.steps * options.batch_size, options.seed)
    torch.manual_seed(options.seed)
    classifier = load_classifier(base, train.domain, "lora", r=RANK, alpha=2 * RANK)
    plain = PlainSide(base, len(train.domain.labels), options, scratch)
    loaded = memory_mib("VmRSS")
    difference = check_equal(classifier, plain, rounds[0], options.peer_targets)
    train_streams(classifier, StreamSubset(train, rounds[0].windows[:1]), 1, options, scratch)  # warms up
    prompts = plain.prompts(rounds[0], spread_over_lengths(rounds[0], max(options.peer_batch_sizes)))
    plain.train(plain.prompts(rounds[0], spread_over_lengths(rounds[0], 1)), 1)  # warms up
    speeds = {}
    for plain.batch_size in options.peer_batch_sizes:
        speeds[plain.batch_size] = plain.train(prompts, 1)["targets_per_s"]
    plain.batch_size = max(speeds, key=speeds.get)
    measured = []
    for windows in rounds[1:]:
        rate = matmul_rate(options.matmul_sizes)
        ours = train_streams(classifier, windows, options.steps, options, scratch)
        theirs = plain.train(plain.prompts(windows, spread_over_lengths(windows, options.peer_targets)), options.steps)
        ratio = ours["targets_per_s"] / theirs["targets_per_s"]
        measured.append({"stream": ours, "plain": theirs, "ratio": ratio, "matmul_flops_per_s": rate})
    counts = training.flops_per_token(classifier)
    return {
        "log": {"interactions": len(streams.log), "users": streams.log.num_users},
        "split": {"windows": len(train), "targets": train.num_targets,
                  "tokens_per_target": int(train.lengths.sum()) / train.num_targets},
        "domain": train.domain.to_dict(), "logits_max_difference": difference,
        "plain_batch_size": {"chosen": plain.batch_size, "targets_per_s": speeds}, "rss_loaded_mib": loaded, **counts,
        "summary": summarise(measured, counts["flops_per_token"]), "rounds": measured,
    }  # fmt: skip


def summarise(rounds: list[dict], flops: float) -> dict:
    """Medians and spreads over the rounds of `compare`; the share is tokens/s * operations a token / torch.mm rate."""
    summary: dict = {key: spread([entry[key] for entry in rounds]) for key in ("ratio", "matmul_flops_per_s")}
    for side in ("stream", "plain"):
        for entry in rounds:
            entry[side]["matmul_share"] = entry[side]["tokens_per_s"] * flops / entry["matmul_flops_per_s"]
        keys = ("targets_per_s", "tokens_per_s", "tokens_per_target", "padding", "peak_rss_mib", "matmul_share")
        summary[side] = {key: spread([entry[side][key] for entry in rounds]) for key in keys
                         if rounds[0][side][key] is not None}  # fmt: skip
    return summary


# -- profile ---------------------------------------------------------------------------------------

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linear")
BLOCKS = ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::masked_fill_")
"""What attention in blocks is made of, beside its copies, which count as the rest."""


def by_kind(times: dict[str, float], in_blocks: bool) -> dict[str, float]:
    """Shares of the operations' own times: products with weights, attention, rest."""
    total, own = sum(times.values()), BLOCKS if in_blocks else ()
    if not total > 0:
        raise ValueError("the profile holds no time")
    of_attention = sum(value for name, value in times.items() if "attention" in name or name in own)
    products = sum(value for name, value in times.items() if name in PRODUCTS and name not in own)
    rest = total - products - of_attention
    return {"products": products / total, "attention": of_attention / total, "rest": rest / total}


def profile_step(options: argparse.Namespace, scratch: Path) -> dict:
    """Where the time of one micro-batch goes, and its share of the machine's matrix-product rate."""
    train = read_streams(options).train
    fitting = np.flatnonzero(train.lengths <= options.tokens)
    if not len(fitting):
        stop(f"no window has {options.tokens} tokens or fewer; raise --tokens")
    window = train[int(fitting[np.argmax(train.lengths[fitting])])]
    torch.manual_seed(options.seed)
    classifier = load_classifier(resolve_base(options.base), train.domain, "lora", r=RANK, alpha=2 * RANK).train()
    batch = StreamCollator(classifier.tokenizer.pad_token_id, options.tokens).one([window])
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask", "segment", "markers")}

    def step(kind: str = classifier.config._attn_implementation) -> None:
        classifier.stock.set_attn_implementation(kind)
        torch.nn.functional.cross_entropy(classifier(**inputs), batch["labels"]).backward()
        classifier.zero_grad()

    in_blocks = classifier.config._attn_implementation == attention.NAME and len(window) >= attention.SHORT
    candidates = in_blocks and batch["segment"] is not None
    rates: list[float] = []
    ways = {"step": step} | ({"mask": functools.partial(step, "sdpa")} if candidates else {})
    seconds = in_turns(ways, options.rounds, lambda: rates.append(matmul_rate(options.matmul_sizes)))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    times = {event.key: float(event.self_cpu_time_total) for event in recorded.key_averages()}
    weights = training.flops_per_token(classifier)["flops_per_token"] * len(window)
    both = weights + training.attention_flops(window.position_ids, classifier.config, training=True)
    mask = {"seconds": spread(seconds["mask"]), "ratio": ratios(seconds, "mask", "step")} if candidates else None
    pairs = list(zip(seconds["step"], rates[1:], strict=True))
    return {
        "tokens": len(window), "targets": len(batch["labels"]),
        "flops": {"weights": weights, "attention": both - weights}, "seconds": spread(seconds["step"]),
        "one_mask": mask, "matmul_flops_per_s": spread(rates[1:]),
        "matmul_share": spread([weights / (second * rate) for second, rate in pairs]),
        "matmul_share_with_attention": spread([both / (second * rate) for second, rate in pairs]),
        "ceiling": weights / both, "profile": by_kind(times, candidates),
    }  # fmt: skip


BENCHMARKS = {
    "compare": Benchmark(compare, "train_speed.json", TRAINING | {
        "steps": (1, "optimizer steps of a round"),
        "batch_size": (RECIPE["train"]["batch_size"], "windows of a step"),
        "peer_targets": (8, "targets of a round of the plain side, at most"),
        "peer_batch_sizes": ([1, 2, 4], "batch sizes of the plain side; the fastest is taken"),
    }, "movies"),
    "profile": Benchmark(profile_step, "step_profile.json", {
        "rounds": (5, "rounds"),
        "tokens": (1024, "the window is the longest of at most so many tokens"),
        "matmul_sizes": TRAINING["matmul_sizes"],
    }, "movies"),
    "curves": CURVES_BENCHMARK,
}  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARKS)

if __name__ == "__main__":
    main()
