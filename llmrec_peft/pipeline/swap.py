"""A bank of domains: its answers to a file of requests, its speed, and what a swap costs."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..config import SwapConfig
from ..data.files import replacing
from ..data.sources.records import is_json
from ..errors import ConfigError
from ..inference.bank import DomainBank
from .requests import answer_line, in_batches, read_requests
from .run import check_place


def swap(config: SwapConfig) -> None:
    """Load a bank, answer the requests, and swap bundles.

    Raises:
        LLMRecError: with one line on what cannot be used.
    """
    if config.output is not None:
        check_place(Path(config.output).parent)
    if not is_json(Path(config.requests)):
        raise ConfigError(f"requests must be an existing file of JSON lines (.jsonl), not {config.requests!r}")
    start = time.perf_counter()
    bank = DomainBank.load(
        config.base,
        config.bundles,
        config.items,
        fallback=config.fallback,
        max_bytes=None if config.max_gb is None else int(config.max_gb * 1e9),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    print(f"base {config.base} with {len(bank)} domains, loaded in {time.perf_counter() - start:.1f} s", flush=True)
    for name, size in bank.sizes().items():
        print(f"  {name:<20} {size / 1e6:8.1f} MB  labels {', '.join(bank.labels(name))}")
    _answer(bank, config)
    _swap(bank, config)


def _answer(bank: DomainBank, config: SwapConfig) -> None:
    requests = candidates = 0
    seconds = 0.0
    with _output(config.output) as file:
        for batch in in_batches(read_requests(config.requests), config.batch_requests):
            start = time.perf_counter()
            found = bank.score([request[:4] for request in batch], batch_tokens=config.batch_tokens)
            seconds += time.perf_counter() - start
            requests, candidates = requests + len(batch), candidates + sum(map(len, found))
            if file is not None:
                for request, probabilities in zip(batch, found, strict=True):
                    labels = bank.labels(request[0] if request[0] in bank else config.fallback)
                    file.write(answer_line(request, labels, probabilities) + "\n")
    print(
        f"{requests} requests, {candidates} candidates in {seconds:.1f} s: "
        f"{requests / max(seconds, 1e-9):.1f} requests/s, {candidates / max(seconds, 1e-9):.1f} candidates/s"
    )
    if config.output is not None:
        print(f"written to {config.output}")


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"output {path} cannot be written ({error.strerror}); choose another") from None


def _swap(bank: DomainBank, config: SwapConfig) -> None:
    """Put each new bundle in and, back, the old one, which is in memory then."""
    fresh, loaded = [], []
    for name, old in config.bundles.items():
        new = config.swap.get(name, old)
        for directory, times in ((new, fresh if new != old else loaded), (old, loaded)):
            start = time.perf_counter()
            bank.swap(name, directory)
            times.append(1e3 * (time.perf_counter() - start))
    print(f"swap of a bundle in memory: {statistics.median(loaded):.2f} ms ({len(loaded)} swaps)")
    if fresh:
        print(f"swap of a bundle on disk: {statistics.median(fresh):.1f} ms ({len(fresh)} swaps)")
