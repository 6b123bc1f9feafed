"""Where the time of a training step goes, and what share of the machine's matrix-product rate it reaches.

One micro-batch of the movies recipe (a window near the longest) goes forward and backward through the LoRA classifier,
a few times beside torch.mm in turns, and once more under PyTorch's profiler. Its own time by kind of operation:
products with weights; attention (PyTorch's flash kernel, or products and softmax in blocks); the rest (norms,
rotations, activations, sums of gradients, and what Python costs).

The share counts 4 N + 6 A operations a token, as train_speed.py does, and attention as none; the share with attention
adds its own products (measuring.attention_of). The ceiling is the share that a step would reach in which these run
at the rate of torch.mm and all else costs nothing. The last layer counts whole, though the package runs most of it at
the answers alone, so that all shares are too high by up to one part in the number of layers.

A window with probes is timed in turns with the same under one dense mask too, which is what Transformers would do with
it.

    python benchmarks/step_profile.py --data DIR [--tokens 1024] [--rounds 5]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measuring import attention_of, cell, header, matmul_rate, quiet, spread, stop, write_result
from torch.profiler import ProfilerActivity, profile
from train_speed import flops_per_token, read_log

from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.errors import LLMRecError
from llmrec_peft.models import attention as blocks
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.models.classifier import load_classifier
from llmrec_peft.runs.split_streams import build_split_streams

ROOT = Path(__file__).resolve().parent
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linear")
BLOCKS = ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::masked_fill_")
"""What attention in blocks is made of, beside its copies, which count as the rest."""


def by_kind(times: dict[str, float], in_blocks: bool) -> dict[str, float]:
    """Shares of the operations' own times: products, attention, rest. Raises ValueError if they come to nothing."""
    total = sum(times.values())
    if not total > 0:
        raise ValueError("the profile holds no time")
    own = BLOCKS if in_blocks else ()
    attention = sum(value for name, value in times.items() if "attention" in name or name in own)
    products = sum(value for name, value in times.items() if name in PRODUCTS and name not in own)
    return {"products": products / total, "attention": attention / total,
            "rest": (total - products - attention) / total}  # fmt: skip


def measure(options: argparse.Namespace) -> dict:
    """Time and profile one micro-batch."""
    domain, base = Domain.from_yaml(options.domain), resolve_base(options.base)
    train = build_split_streams(read_log(options.data), domain, load_tokenizer(base)).train
    fitting = np.flatnonzero(train.lengths <= options.tokens)
    if not len(fitting):
        stop(f"no window has {options.tokens} tokens or fewer; raise --tokens")
    window = train[int(fitting[np.argmax(train.lengths[fitting])])]
    torch.manual_seed(options.seed)
    classifier = load_classifier(base, domain, "lora", r=16, alpha=32).train()
    batch = StreamCollator(classifier.tokenizer.pad_token_id, options.tokens).one([window])
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask", "segment", "markers")}

    def step(kind: str = classifier.config._attn_implementation) -> float:
        classifier.stock.set_attn_implementation(kind)
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(classifier(**inputs), batch["labels"]).backward()
        classifier.zero_grad()
        return time.perf_counter() - start

    in_blocks = classifier.config._attn_implementation == blocks.NAME and len(window) >= blocks.SHORT
    probes = in_blocks and batch["segment"] is not None
    seconds, masked, rates = [], [], []
    for number in range(-1, options.rounds):  # the first is to warm up
        rates.append(max(matmul_rate(options.matmul_sizes).values()))
        masked += [step("sdpa")] if probes and number % 2 else []
        seconds.append(step())
        masked += [step("sdpa")] if probes and not number % 2 else []
        if number < 0:
            for values in (seconds, masked, rates):
                values.clear()
            continue
        print(f"round {number + 1}: {seconds[-1]:.2f} s, torch.mm {rates[-1] / 1e9:.0f} GFLOP/s", flush=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    times = {event.key: float(event.self_cpu_time_total) for event in recorded.key_averages()}
    tokens = int(window.input_ids.size)
    weights = flops_per_token(classifier)["flops_per_token"] * tokens
    attention = attention_of(window.position_ids, classifier.config, training=True)
    pairs = list(zip(seconds, rates, strict=True))
    return {
        "settings": {
            "base": options.base,
            "domain": domain.name,
            "rounds": options.rounds,
            "tokens": options.tokens,
            "matmul_sizes": options.matmul_sizes,
        },
        "tokens": tokens,
        "targets": len(batch["labels"]),
        "flops": {"weights": weights, "attention": attention},
        "seconds": spread(seconds),
        "one_mask": {
            "seconds": spread(masked),
            "ratio": spread([slow / fast for slow, fast in zip(masked, seconds, strict=True)]),
        }
        if probes
        else None,
        "matmul_flops_per_s": spread(rates),
        "matmul_share": spread([weights / (second * rate) for second, rate in pairs]),
        "matmul_share_with_attention": spread([(weights + attention) / (second * rate) for second, rate in pairs]),
        "ceiling": weights / (weights + attention),
        "profile": by_kind(times, probes),
    }


def show(result: dict) -> None:
    """Print the shares."""
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in result["profile"].items())
    share, both = result["matmul_share"], result["matmul_share_with_attention"]
    print(f"{result['tokens']} tokens, {result['targets']} targets in {result['seconds']['median']:.2f} s: {kinds}")
    print(f"share of torch.mm {share['median']:.1%} ({share['min']:.1%} to {share['max']:.1%}); attention counted "
          f"{both['median']:.1%} ({both['min']:.1%} to {both['max']:.1%}); ceiling of the first "
          f"{result['ceiling']:.1%}")  # fmt: skip
    if result["one_mask"]:
        print(f"{cell(result['one_mask']['ratio'], '{:.2f}')} times as fast as under one mask")


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print and write the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of a log; default: where the downloader puts MovieLens")
    parser.add_argument("--domain", default=str(ROOT.parent / "recipes/configs/movies/domain.yaml"))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024, help="the window is the longest of at most so many tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matmul-sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "results" / "step_profile.json"))
    options = parser.parse_args(arguments)
    try:
        with quiet():
            found = measure(options)
    except LLMRecError as error:
        stop(str(error))
    result = header(__file__, sys.argv[1:] if arguments is None else arguments, options.seed) | found
    write_result(options.output, result)
    show(result)
    return result


if __name__ == "__main__":
    main()
