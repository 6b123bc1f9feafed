"""Scoring a file of requests to several domains with one bank, and timing a swap of bundles."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from llmrec_peft.checkpoints.bundle import check_bundle
from llmrec_peft.config.schema import ScoreConfig
from llmrec_peft.data.readers.json_records import is_json
from llmrec_peft.errors import BundleError, ConfigError, DataError
from llmrec_peft.files import replacing, writing
from llmrec_peft.messages import listed, quoted
from llmrec_peft.runs.output_paths import check_output_file
from llmrec_peft.runs.request_files import holds_predictions, in_batches, prediction_line, read_requests
from llmrec_peft.scoring.bank import DomainBank
from llmrec_peft.scoring.versions import check_name


def score(config: ScoreConfig) -> None:
    """Load a bank, score the requests, and swap bundles.

    Raises:
        LLMRecError: with one line on what cannot be used.
    """
    # Settings. All requests are read once before the base is loaded, which takes seconds.
    if not is_json(Path(config.requests)):
        raise ConfigError(f"requests must be an existing file of JSON lines (.jsonl), not {config.requests!r}")
    bundles = {f"bundles.{name}": path for name, path in config.bundles.items()}
    bundles |= {f"swap.{name}": path for name, path in config.swap.items()}
    if config.output is not None:
        items = {f"items.{name}": path for name, path in config.items.items()}
        inputs = {"requests": config.requests, "base": config.base, **bundles, **items}
        check_output_file(config.output, inputs, own=holds_predictions)
    for name in config.bundles:
        check_name(name)
    _check_requests(config)

    # Bank: one base and the adapters of all domains.
    base = _base(config, bundles)
    start = time.perf_counter()
    bank = DomainBank.load(
        base,
        config.bundles,
        config.items,
        fallback=config.fallback,
        max_bytes=None if config.max_gb is None else int(config.max_gb * 1e9),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    print(f"base {base} with {len(bank)} domains, loaded in {time.perf_counter() - start:.1f} s", flush=True)
    for name, size in bank.sizes().items():
        print(f"  {name:<20} {size / 1e6:8.1f} MB  labels {', '.join(bank.labels(name))}")

    # Score.
    requests = candidates = 0
    seconds = 0.0
    with _output(config.output) as file:
        for batch in in_batches(read_requests(config.requests), config.batch_requests):
            start = time.perf_counter()
            found = bank.score([request.for_bank for request in batch], batch_tokens=config.batch_tokens)
            seconds += time.perf_counter() - start
            requests, candidates = requests + len(batch), candidates + sum(map(len, found))
            if file is not None:
                for request, probabilities in zip(batch, found, strict=True):
                    labels = bank.labels(_served_domain(bank, config, request.domain))
                    file.write(prediction_line(request, labels, probabilities) + "\n")
    print(
        f"{requests} requests, {candidates} candidates in {seconds:.1f} s: "
        f"{requests / max(seconds, 1e-9):.1f} requests/s, {candidates / max(seconds, 1e-9):.1f} candidates/s"
    )
    if config.output is not None:
        print(f"written to {config.output}")

    # Swap.
    _time_swaps(bank, config)


def _check_requests(config: ScoreConfig) -> None:
    """Raise DataError for a request that cannot be read or whose domain is not in the bank."""
    for number, request in enumerate(read_requests(config.requests)):
        if config.fallback is None and request.domain not in config.bundles:
            raise DataError(
                f"request {number} of {config.requests} is of domain {quoted(request.domain)}, which is not in the "
                f"bank; use one of {listed(sorted(config.bundles))}, or set fallback"
            )


def _base(config: ScoreConfig, bundles: Mapping[str, str]) -> str:
    """The configured base, or the one that all bundles name."""
    found: dict[str, tuple[str, str]] = {}
    for key, directory in bundles.items():
        manifest = check_bundle(directory)[0]
        options = manifest["model_options"]
        source = str(options["base"])
        if options.get("gguf_file"):
            source = str(Path(source) / options["gguf_file"])
        found.setdefault(str(manifest["base"].get("fingerprint")), (key, source))
    if len(found) > 1:
        (one, its), (other, others) = list(found.values())[:2]
        raise BundleError(
            f"{one} was trained on base {its} and {other} on base {others}, whose weights differ; a bank has one base: "
            "run the recipe once for each base"
        )
    return next(iter(found.values()))[1] if config.base is None else config.base


def _served_domain(bank: DomainBank, config: ScoreConfig, domain: str) -> str:
    """The domain that scores a request of `domain`: itself, or the fallback."""
    return domain if domain in bank or config.fallback is None else config.fallback


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    with writing(path, "output"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
            yield file


def _time_swaps(bank: DomainBank, config: ScoreConfig) -> None:
    """Swap each new bundle in, from disk, and the old one back, from memory; print the median times."""
    from_disk: list[float] = []
    from_memory: list[float] = []
    for name, old in config.bundles.items():
        new = config.swap.get(name, old)
        for directory, times in ((new, from_disk if new != old else from_memory), (old, from_memory)):
            if times is from_memory:
                bank.preload(directory)
            start = time.perf_counter()
            bank.swap(name, directory)
            times.append(1e3 * (time.perf_counter() - start))
    print(f"swap of a bundle in memory: {statistics.median(from_memory):.2f} ms ({len(from_memory)} swaps)")
    if from_disk:
        print(f"swap of a bundle on disk: {statistics.median(from_disk):.1f} ms ({len(from_disk)} swaps)")
