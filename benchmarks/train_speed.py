"""Speed of a training step on streams.

    python -m benchmarks.train_speed compare --data DIR [--rounds 3] [--peer-targets 8]
    python -m benchmarks.train_speed profile --data DIR [--tokens 1024] [--rounds 5]
    python -m benchmarks.train_speed batch_tokens --data DIR [--train 500 1000] [--evaluate 1000 4000]
    python -m benchmarks.train_speed curves --data DIR [--rounds 3] [--curves context rank]

All train LoRA of rank 16 on all linear layers in float32.

compare: streams beside the plain way (quality/peers/plain.py) in turns, on the same targets, with the same answers
before any step. Each round draws new windows; the plain side trains on --peer-targets of their targets, spread evenly
over prompt lengths.

profile: one micro-batch forward and backward, in turns with torch.mm, and once under PyTorch's profiler. A window with
candidates is also timed under one dense mask, which is what Transformers would do with it.

batch_tokens: targets/s by tokens of a micro-batch, for `train.micro_tokens` and `evaluation.batch_tokens`.

curves: targets/s and peak memory by history events, targets of a window, candidates of one new history (scoring), rank,
and layers of the base (the first so many). Points of one round see the same windows as far as these have the same first
target. The floor is the time of the operations alone at the rate of torch.mm:

    floor = targets * rate / (tokens * operations a token [+ operations of attention])

Operations a token: frozen weights (N, without embeddings) take a forward pass and a backward pass to their inputs,
trained ones (A) a backward pass to themselves too: 4 N + 6 A. Scoring takes 2 N, as the adapter lies in the weights.
Attention takes 4 d for each pair of tokens that the mask allows and each layer, d being heads * head size, and twice
that backward. All count the last layer whole, though it runs at the markers alone, so shares are too high by up to one
part in the number of layers.
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import (
    RECIPE,
    Benchmark,
    PositionCounter,
    StepClock,
    behavior_trainer,
    memory_mib,
    read_log,
    read_streams,
    release_memory,
    reset_peak,
    run,
    spread,
    stop,
    training_arguments,
)
from benchmarks.quality.peers.plain import PromptDataset, load_plain, plain_logits, plain_trainer
from benchmarks.quality.peers.streams import domain_with_windows, texts_of
from benchmarks.score_speed import RequestTokens, make_bundle, pick_request
from llmrec_peft import Domain, Scorer, load_classifier
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.streams import IndependentPrompts, StreamDataset, StreamSubset
from llmrec_peft.distillation.shallow_student import write_shallow_student
from llmrec_peft.models import attention
from llmrec_peft.models.base import load_config, load_tokenizer, resolve_base
from llmrec_peft.models.predict import predict
from llmrec_peft.models.requirements import check_positions

RANK = 16
TOLERANCE = 1e-4  # of logits, between both sides


# -- operations ------------------------------------------------------------------------------------


def matmul_rate(sizes: list[int], operations: float = 1.4e11) -> float:
    """Best float32 operations a second of torch.mm on square matrices; a product of n x n matrices takes 2 n^3."""
    rates = []
    for size in sizes:
        a, b = torch.rand(size, size), torch.rand(size, size)
        out = torch.mm(a, b)
        repeats = min(100, max(1, round(operations / (2 * size**3))))
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        rates.append(repeats * 2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def flops_per_token(classifier) -> dict[str, float]:
    """N, A and 4 N + 6 A of the module's docstring."""
    trained, total = classifier.trainable_parameters()
    frozen_head = sum(p.numel() for p in classifier.head.parameters() if not p.requires_grad)
    embeddings = sum(p.numel() for p in classifier.stock.get_input_embeddings().parameters())
    base = total - trained - embeddings - frozen_head
    return {"base_parameters": base, "trained_parameters": trained, "flops_per_token": 4 * base + 6 * trained}


def attention_flops(positions: np.ndarray, config, *, training: bool) -> float:
    """Operations of attention's two products for tokens at `positions`, int [L], in the order of the model's input.

    A token at position p sees itself and the p tokens before it on its path, whatever candidates lie between: p + 1
    pairs.
    """
    text = config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    pairs = float((np.asarray(positions, np.int64) + 1).sum())
    return (3 if training else 1) * 4 * width * pairs * text.num_hidden_layers


# -- compare ---------------------------------------------------------------------------------------


def targets_of(windows: StreamSubset) -> int:
    """Number of targets in a subset of windows."""
    return int(np.diff(windows.parent.target_offsets)[windows.windows].sum())


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


def timed(trainer, clock: StepClock, counter: PositionCounter, targets: int, tokens: int) -> dict:
    """Train; time, throughput, padding and peak memory."""
    reset_peak()
    before = counter.count
    trainer.train()
    computed, seconds = counter.count - before, clock.seconds
    return {
        "targets": targets, "tokens": tokens, "computed_tokens": computed, "steps": clock.steps, "seconds": seconds,
        "targets_per_s": targets / seconds, "tokens_per_s": tokens / seconds, "tokens_per_target": tokens / targets,
        "padding": 1 - tokens / computed, "peak_rss_mib": memory_mib(),
    }  # fmt: skip


def train_streams(classifier, windows: StreamSubset, steps: int, options: argparse.Namespace, scratch: Path) -> dict:
    """One epoch of `windows` in `steps` steps through BehaviorTrainer."""
    clock, counter = StepClock(), PositionCounter(classifier.stock)
    arguments = training_arguments(
        scratch, per_device_train_batch_size=-(-len(windows) // steps), learning_rate=options.learning_rate,
        seed=options.seed,
    )  # fmt: skip
    trainer = behavior_trainer(classifier, arguments, windows, options.micro_tokens, clock)
    return timed(trainer, clock, counter, targets_of(windows), int(windows.lengths.sum()))


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
        return timed(trainer, clock, self.counter, len(prompts), sum(prompts.lengths))


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
    counts = flops_per_token(classifier)
    return {
        "log": {"interactions": len(streams.log), "users": streams.log.num_users},
        "split": {"windows": len(train), "targets": train.num_targets,
                  "tokens_per_target": int(train.lengths.sum()) / train.num_targets},
        "domain": train.domain.to_dict(), "answers_max_difference": difference,
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

    def step(kind: str = classifier.config._attn_implementation) -> float:
        classifier.stock.set_attn_implementation(kind)
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(classifier(**inputs), batch["labels"]).backward()
        classifier.zero_grad()
        return time.perf_counter() - start

    in_blocks = classifier.config._attn_implementation == attention.NAME and len(window) >= attention.SHORT
    candidates = in_blocks and batch["segment"] is not None
    seconds, masked, rates = [], [], []
    for number in range(-1, options.rounds):  # the first round warms up
        entry = [matmul_rate(options.matmul_sizes), 0.0, 0.0]
        for which in (1, 2) if number % 2 else (2, 1):
            entry[which] = step() if which == 1 else step("sdpa") if candidates else 0.0
        if number >= 0:
            for values, value in zip((rates, seconds, masked), entry, strict=True):
                values.append(value)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    times = {event.key: float(event.self_cpu_time_total) for event in recorded.key_averages()}
    weights = flops_per_token(classifier)["flops_per_token"] * len(window)
    both = weights + attention_flops(window.position_ids, classifier.config, training=True)
    mask = {"seconds": spread(masked), "ratio": spread([a / b for a, b in zip(masked, seconds, strict=True)])}
    pairs = list(zip(seconds, rates, strict=True))
    return {
        "tokens": len(window), "targets": len(batch["labels"]),
        "flops": {"weights": weights, "attention": both - weights}, "seconds": spread(seconds),
        "one_mask": mask if candidates else None, "matmul_flops_per_s": spread(rates),
        "matmul_share": spread([weights / (second * rate) for second, rate in pairs]),
        "matmul_share_with_attention": spread([both / (second * rate) for second, rate in pairs]),
        "ceiling": weights / both, "profile": by_kind(times, candidates),
    }  # fmt: skip


# -- batch_tokens ----------------------------------------------------------------------------------


def batch_tokens(options: argparse.Namespace, scratch: Path) -> dict:
    """Targets/s of training and prediction by tokens of a micro-batch."""
    streams = read_streams(options).train
    classifier = load_classifier(resolve_base(options.base), streams.domain, "lora", r=RANK, alpha=2 * RANK)
    rounds = draw_rounds(streams, options.rounds, options.windows, options.seed)

    def training(windows: StreamSubset, tokens: int) -> dict:
        options.micro_tokens = tokens
        return train_streams(classifier, windows, 1, options, scratch)

    def prediction(windows: StreamSubset, tokens: int) -> dict:
        reset_peak()
        start, collator = time.perf_counter(), StreamCollator(classifier.tokenizer.pad_token_id, tokens)
        predict(classifier, windows, collator, batch_tokens=tokens)
        return {"targets_per_s": targets_of(windows) / (time.perf_counter() - start), "peak_rss_mib": memory_mib()}

    training(StreamSubset(streams, rounds[0].windows[:1]), 1000)  # warms up
    found: dict = {"mean_window_tokens": float(streams.lengths.mean())}
    for name, part, sizes in (("train", training, options.train), ("evaluate", prediction, options.evaluate)):
        entries = {size: [] for size in sizes}
        for windows in rounds[1:]:
            for size in sizes:
                entries[size].append(part(windows, size))
        found[name] = {size: {"targets_per_s": spread([one["targets_per_s"] for one in several]),
                              "peak_rss_mib": max(one["peak_rss_mib"] or 0.0 for one in several)}
                       for size, several in entries.items()}  # fmt: skip
    return found


# -- curves ----------------------------------------------------------------------------------------

CURVES = {
    "context": ("history events before the targets", "targets"),
    "targets": ("events answered in a window", "targets"),
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
        from llmrec_peft.runs.split_streams import split_by_domain, streams_for_split

        domain = domain_with_windows(options.domain, context, targets, options.max_length)
        found = streams_for_split(split_by_domain(log, domain), "train", domain, tokenizer)
        windows = np.flatnonzero((found.history_sizes == context) & (np.diff(found.target_offsets) == targets))
        if not len(windows):
            stop(f"no training window has {context} history events and {targets} to answer; ask for fewer")
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


def warm_up(classifier) -> None:
    """One step on 64 tokens."""
    trained = [parameter for parameter in classifier.train().parameters() if parameter.requires_grad]
    classifier(input_ids=torch.zeros(1, 64, dtype=torch.int64), markers=torch.tensor([63])).sum().backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained).step()


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


def score_point(scorer: Scorer, prefix: np.ndarray, texts: list[np.ndarray], request: tuple, costs: tuple) -> dict:
    """Predictions for the candidates of one new history; equal texts are scored once."""
    # Positions go on from the prefix in each candidate.
    own = {tokens.tobytes(): len(prefix) + np.arange(len(tokens)) for tokens in texts}
    positions = np.concatenate([np.arange(len(prefix)), *own.values()])
    reset_peak()
    rest, start = memory_mib("VmRSS"), time.perf_counter()
    scorer.score(*request)
    seconds, (flops, config) = time.perf_counter() - start, costs
    return {
        "count": len(texts), "tokens": len(positions), "seconds": seconds, "per_s": len(texts) / seconds,
        "peak_mib": memory_mib(), "rest_mib": rest, "flops_per_token": flops,
        "attention_flops": attention_flops(positions, config, training=False),
    }  # fmt: skip


def score_points(options: argparse.Namespace, log, bundle: Path, costs: tuple):
    """(number of candidates, entry) of each point of the curve of candidates."""
    scorer = Scorer.load(bundle, log, cache_bytes=0)
    tokens = RequestTokens(scorer.domain, load_tokenizer(resolve_base(options.base)), log)
    history, candidates = pick_request(log, tokens, options.tokens, max(options.candidates), options.seed)
    prefix, texts = tokens.prefix(history), tokens.events(candidates)
    scorer.score(history[:1], candidates[:1])  # warms up
    for x in sorted(options.candidates):
        yield x, score_point(scorer, prefix, texts[:x], (history, candidates[:x]), costs)


def curves(options: argparse.Namespace, scratch: Path) -> dict:
    """Throughput and memory by context, targets, candidates, rank and layers."""
    log, domain, base = read_log(options), Domain.from_yaml(options.domain), resolve_base(options.base)
    options.window = options.window if options.window[1] else [domain.stream.context, domain.stream.targets]
    if "candidates" in options.curves and max(options.candidates) > log.num_items:
        stop(f"--candidates must be at most {log.num_items}, the items the log has, got {max(options.candidates)}")
    check_positions(load_config(base), options.max_length)
    points = lay_out(options, log, base, scratch)
    if "candidates" in options.curves:
        bundle = make_bundle(scratch / "bundle", base, domain, options.seed)
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
    "batch_tokens": Benchmark(batch_tokens, "batch_tokens.json", {
        "rounds": TRAINING["rounds"], "learning_rate": TRAINING["learning_rate"],
        "train": ([500, 700, 1000, 1400, 2000], "tokens of a micro-batch in training"),
        "evaluate": ([1000, 2000, 4000, 8000], "tokens of a micro-batch in prediction"),
        "windows": (4, "windows of a round"),
    }, "movies"),
    "curves": Benchmark(curves, "cost_curves.json", TRAINING | {
        "curves": (list(CURVES), "curves to measure", CURVES),
        "context": ([0, 5, 10, 20, 40], "points of this curve"), "targets": ([1, 4, 10, 30], "the same"),
        "candidates": ([1, 5, 20, 50, 200], "the same"), "rank": ([2, 8, 16, 64], "the same"),
        "layers": ([5, 10, 20, 30], "the same"),
        "window": ([0, 0], "context and targets of a window where no point sets them (default: the domain's)"),
        "max_length": (4096, "tokens of a window, at most"), "step_tokens": (1800, "tokens of a step, at least"),
        "tokens": (400, "tokens of the history in scoring, at least"),
    }, "movies"),
}  # fmt: skip


main = functools.partial(run, __file__, __doc__, BENCHMARKS)

if __name__ == "__main__":
    main()
