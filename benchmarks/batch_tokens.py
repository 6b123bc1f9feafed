"""Targets/s of training and of answering by the tokens that a micro-batch holds.

    python benchmarks/batch_tokens.py [--data DIR] [--domain FILE] [--train 500 1000 2000] [--evaluate 1000 4000]

Every round runs each size once on the same windows of the training split, in turns. Use the fastest for
`train.micro_tokens` and `evaluation.batch_tokens`: it depends on the machine, not on the answers.
"""

import argparse
import sys
import tempfile
import time

from measuring import header, memory_mib, quiet, reset_peak, spread, stop, write_result
from train_speed import CONFIG, ROOT, StreamSide, draw_rounds, read_log, targets_of

from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import StreamSubset
from llmrec_peft.errors import LLMRecError
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.models.classifier import load_classifier
from llmrec_peft.models.predict import predict
from llmrec_peft.runs.split_streams import build_split_streams


def answer(side: StreamSide, windows: StreamSubset, tokens: int) -> dict[str, float]:
    """Answer all targets of `windows` with `tokens` tokens in a batch."""
    reset_peak()
    start = time.perf_counter()
    predict(
        side.classifier, windows, StreamCollator(side.classifier.tokenizer.pad_token_id, tokens), batch_tokens=tokens
    )
    return {"targets_per_s": targets_of(windows) / (time.perf_counter() - start), "peak_rss_mib": memory_mib()}


def train(side: StreamSide, windows: StreamSubset, tokens: int) -> dict[str, float]:
    """Train a step on `windows` with `tokens` tokens in a micro-batch."""
    side.options.micro_tokens = tokens
    return side.train(windows, 1)


def run(options: argparse.Namespace, scratch: str) -> dict:
    """Speeds and memory by part and size."""
    domain, base = Domain.from_yaml(options.domain), resolve_base(options.base)
    streams = build_split_streams(read_log(options.data), domain, load_tokenizer(base)).train
    side = StreamSide(load_classifier(base, domain, "lora", r=16, alpha=32), options, scratch)
    rounds = draw_rounds(streams, options.rounds, options.windows, options.seed)
    train(side, StreamSubset(streams, rounds[0].windows[:1]), 1000)  # warms up
    found: dict = {"mean_window_tokens": float(streams.lengths.mean())}
    for name, part, sizes in (("train", train, options.train), ("evaluate", answer, options.evaluate)):
        speeds, peaks = {size: [] for size in sizes}, {size: 0.0 for size in sizes}
        for windows in rounds[1:]:
            for size in sizes:
                result = part(side, windows, size)
                speeds[size].append(result["targets_per_s"])
                peaks[size] = max(peaks[size], result["peak_rss_mib"] or 0.0)
        found[name] = {size: {"targets_per_s": spread(speeds[size]), "peak_rss_mib": peaks[size]} for size in sizes}
        for size, entry in found[name].items():
            speed = entry["targets_per_s"]
            print(f"{name} {size:6} tokens: {speed['median']:.3f} ({speed['min']:.3f} to {speed['max']:.3f}) targets/s,"
                  f" peak {entry['peak_rss_mib']:.0f} MiB", flush=True)  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print and write the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="directory of a log; default: MovieLens where the downloader puts it")
    parser.add_argument("--domain", default=str(CONFIG / "domain.yaml"), help="domain file")
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--train", type=int, nargs="*", default=[500, 700, 1000, 1400, 2000], help="sizes")
    parser.add_argument("--evaluate", type=int, nargs="*", default=[1000, 2000, 4000, 8000], help="sizes")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each size takes")
    parser.add_argument("--windows", type=int, default=4, help="windows of a turn")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0, help="of windows and adapters")
    parser.add_argument("--output", default=str(ROOT / "results" / "batch_tokens.json"), help="result file")
    options = parser.parse_args(arguments)
    try:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            result = run(options, scratch)
    except LLMRecError as error:
        stop(str(error))
    given = sys.argv[1:] if arguments is None else arguments
    result = {**header(__file__, given, options.seed), **result}
    write_result(options.output, result)
    return result


if __name__ == "__main__":
    main()
