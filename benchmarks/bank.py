"""A bank of domains beside what a user would do instead: throughput, swaps and memory.

Two bundles of LoRA (r 16, all linear layers) with random weights, on one base; requests of both domains, mixed, with
histories of 20 items and 10 candidates each. In each round, on the same requests:
- merged: one merged model answers them all, as if they were of its domain, in the bank's own batches;
- bank: the bank answers each by its domain's bundle;
- load per request: for each request its bundle is loaded by PEFT onto the base in memory, and answers it.

python benchmarks/bank.py [--data DIR --domain FILE.yaml] [--rounds N]
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import header, machine, memory_mib, quiet, release_memory, spread, write_result

from llmrec_peft import BehaviorLog, Domain, load_classifier
from llmrec_peft.checkpoints.bundle import load_bundle, save_bundle
from llmrec_peft.config.schema import DataConfig
from llmrec_peft.data.batches import plan_micro_batches
from llmrec_peft.data.collator import collate
from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.runs.split_streams import read_log
from llmrec_peft.scoring.bank import DomainBank

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="simulated:shop")
    parser.add_argument("--domain", default=str(ROOT / "recipes/configs/shop/domain.yaml"))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--domains", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/bank.json"))
    options = parser.parse_args()
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        result = header(__file__, sys.argv[1:], options.seed) | measure(options, Path(scratch))
    write_result(options.output, result)
    show(result)


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    torch.manual_seed(options.seed)
    log = read_log(DataConfig(path=options.data))
    domain = Domain.from_yaml(options.domain)
    bundles = [make_bundle(scratch / f"bundle-{number}", options.base, domain, number) for number in range(2)]
    names = dict(zip(("one", "two"), bundles, strict=True))
    bank = DomainBank.load(options.base, names, dict.fromkeys(names, log))
    requests = make_requests(log, domain, options)
    merged = merge_in_memory(bundles[0])
    batches = merged_batches(bank, requests, options.batch_tokens)
    tokens = sum(int(batch["input_ids"].numel()) for batch in batches)
    ways = {
        "merged": lambda: run(merged, batches),
        "bank": lambda: bank.score(requests, batch_tokens=options.batch_tokens),
    }
    times = interleaved(ways, options.rounds)
    per_request = load_per_request(options, names, bank, requests[:2])
    ratios = [a / b for a, b in zip(times["merged"], times["bank"], strict=True)]
    return {
        "settings": {
            "data": log.name, "domain": domain.name, "base": options.base, "requests": len(requests),
            "candidates": options.candidates, "tokens": tokens, "rounds": options.rounds,
            "batch_tokens": options.batch_tokens,
        },
        "seconds": {name: spread(values) for name, values in times.items()} | {"load_per_request": per_request},
        "throughput_of_merged": spread(ratios),
        "throughput_of_load_per_request": per_request["per_request"] * len(requests) / statistics.median(times["bank"]),
        "swaps_ms": swaps(bank, bundles, scratch, options.rounds),
        "many": many(options, scratch, bundles[0], log),
        "rounds": times,
    }  # fmt: skip


def make_bundle(directory: Path, base: str, domain: Domain, seed: int) -> Path:
    """A bundle whose B factors are random, as after training: zeros would be as fast, and hide a wrong answer."""
    torch.manual_seed(seed)
    classifier = load_classifier(base, domain, "lora", r=16)
    with torch.no_grad():
        for name, value in classifier.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.01)
    return save_bundle(directory, classifier, classifier.tokenizer, domain.to_dict())


def make_requests(log: BehaviorLog, domain: Domain, options: argparse.Namespace) -> list[tuple]:
    rng = np.random.default_rng(options.seed)
    ids = log.items.column("item_id").to_pylist()
    columns = [name for name in domain.header_columns]
    user = {name: log.interactions.column(name)[0].as_py() for name in columns}
    context = [name for name in domain.event_columns if name not in log.items.column_names]
    extra = {name: log.interactions.column(name)[0].as_py() for name in context}

    def event() -> dict:
        return {"item_id": ids[rng.integers(len(ids))], **extra}

    return [
        (
            ("one", "two")[number % 2],
            [(event(), domain.labels[rng.integers(len(domain.labels))]) for _ in range(20)],
            [event() for _ in range(options.candidates)],
            user,
        )
        for number in range(options.requests)
    ]


def merge_in_memory(bundle: Path):
    classifier = load_bundle(bundle).classifier
    classifier.model = classifier.model.merge_and_unload()
    return classifier.eval()


def merged_batches(bank: DomainBank, requests: list[tuple], batch_tokens: int) -> list[dict]:
    """The very rows that the bank makes of the requests, in the same batches."""
    streams = []
    for name, history, candidates, user in requests:
        prompts = bank._entries[name].prompts
        prefix, build = prompts.prefix(history, user), StreamBuilder([])
        build.prefix(prefix.header, *prefix.events)
        markers = [build.candidate(probe, probe[:0]) for probe in prompts.events(candidates, "candidates")]
        zeros = np.zeros(len(markers), np.int64)
        streams.append(Stream(*build.arrays(), np.array(markers), zeros, zeros, zeros))
    groups = plan_micro_batches(np.array([len(stream) for stream in streams]), batch_tokens)
    return [collate([streams[row] for row in group], 0) for group in groups]


def run(classifier, batches: list[dict]) -> list[torch.Tensor]:
    names = ("input_ids", "position_ids", "markers", "attention_mask", "segment")
    with torch.inference_mode():
        return [classifier(**{name: batch[name] for name in names}) for batch in batches]


def interleaved(ways: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that is not counted; every other round goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            start = time.perf_counter()
            ways[name]()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def load_per_request(options, names: dict, bank: DomainBank, requests: list[tuple]) -> dict[str, float]:
    """PEFT's own way to change adapters: load the bundle onto a base in memory, answer, unload."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from llmrec_peft.models.base import load_tokenizer, resolve_base
    from llmrec_peft.models.classifier import BehaviorClassifier

    source, count = resolve_base(options.base), len(bank.labels("one"))
    stock = AutoModelForSequenceClassification.from_pretrained(source, num_labels=count, dtype=torch.float32)
    stock.config.pad_token_id = load_tokenizer(source).pad_token_id
    seconds = []
    for request in requests:
        batches = merged_batches(bank, [request], options.batch_tokens)
        start = time.perf_counter()
        model = PeftModel.from_pretrained(stock, names[request[0]]).eval()
        run(BehaviorClassifier(model, "lora", bank.labels("one")), batches)
        stock = model.unload()
        seconds.append(time.perf_counter() - start)
    return {"per_request": statistics.median(seconds)}


def swaps(bank: DomainBank, bundles: list[Path], scratch: Path, rounds: int) -> dict[str, dict[str, float]]:
    loaded, fresh = [], []
    for number in range(max(rounds, 10)):
        copy = scratch / f"swap-{number}"
        shutil.copytree(bundles[number % 2], copy)
        for place, times in ((copy, fresh), (bundles[0], loaded), (copy, loaded)):
            start = time.perf_counter()
            bank.swap("one", place)
            times.append(1e3 * (time.perf_counter() - start))
    bank.swap("one", bundles[0])
    return {"in_memory": spread(loaded), "on_disk": spread(fresh)}


def many(options: argparse.Namespace, scratch: Path, bundle: Path, log: BehaviorLog) -> dict[str, float]:
    """Memory of a bank of many domains, all of them in memory."""
    names = {}
    for number in range(options.domains):
        names[f"d{number}"] = scratch / f"many-{number}"
        names[f"d{number}"].mkdir()
        for file in bundle.iterdir():  # one copy on disk is enough: a bank tells bundles apart by their place
            (names[f"d{number}"] / file.name).hardlink_to(file)
    bank = DomainBank.load(options.base, {"first": bundle})
    release_memory()
    before = memory_mib("RssAnon")
    start = time.perf_counter()
    for name, directory in names.items():
        bank.add(name, directory, None)
    seconds = time.perf_counter() - start
    after = memory_mib("RssAnon")
    return {
        "domains": len(names),
        "seconds_to_load": seconds,
        "mb_per_domain": (after - before) * 2**20 / 1e6 / len(names),
        "mb_of_tensors": bank.sizes()["d0"] / 1e6,
    }


def show(result: dict) -> None:
    ratio, swap, many_ = result["throughput_of_merged"], result["swaps_ms"], result["many"]
    print(f"{result['settings']['requests']} mixed requests, {result['settings']['tokens']} tokens, {machine()['cpu']}")
    print(f"bank against merged: {ratio['median']:.3f} of its throughput ({ratio['min']:.3f} to {ratio['max']:.3f})")
    print(f"bank against load per request: {result['throughput_of_load_per_request']:.2f} times its throughput")
    print(f"swap in memory: {swap['in_memory']['median']:.2f} ms (most {swap['in_memory']['max']:.2f})")
    print(f"swap from disk: {swap['on_disk']['median']:.0f} ms (most {swap['on_disk']['max']:.0f})")
    print(f"{many_['domains']} domains: {many_['mb_per_domain']:.1f} MB each, {many_['seconds_to_load']:.1f} s to load")


if __name__ == "__main__":
    main()
