"""Scores requests with any number of candidates; only a bounded number of them is encoded at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm.auto import tqdm

from llmrec_peft.requests.batching import RequestBatch
from llmrec_peft.requests.encoded_request import Prefix
from llmrec_peft.requests.request import Request
from llmrec_peft.requests.request_encoder import RequestEncoder
from llmrec_peft.scoring.engine import Engine
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter

CHUNK = 4096
"""Different candidates that are computed together, and candidates that are encoded together. A call with no more, over
all its requests, is computed in one go."""
REPEATS = 64
"""A batch holds at most this many times `CHUNK` candidates, repeated ones included."""


@dataclass(frozen=True)
class PinnedVersion:
    """The version of a domain that serves all of one call: an adapter, and the encoder of its requests."""

    adapter: LoadedAdapter
    encoder: RequestEncoder


Versions = Mapping[str, PinnedVersion]
"""From the domain of a request to the version that serves it."""


def predict_probabilities(
    engine: Engine, requests: Sequence[Request], versions: Versions, batch_tokens: int
) -> list[np.ndarray]:
    """Calibrated probabilities of each request, float64 [candidates, labels].

    Up to `CHUNK` candidates in all are encoded at once. Where there are more, all are checked first, so that an error
    shows before anything is computed; then they are encoded again and computed chunk by chunk. Requests with one
    history follow one another, so that it is encoded once for each batch that they fill.

    Raises:
        DataError, DomainError, StreamError: as `RequestEncoder.encode` does; the message names the request.
        ModelError: a logit is not a finite number.
    """
    counts = [request.count() for request in requests]
    results = [
        np.empty((count, len(versions[request.domain].adapter.labels)))
        for request, count in zip(requests, counts, strict=True)
    ]
    # Encoded candidates of a small call fit into memory together.
    if sum(counts) > CHUNK:
        _predict_in_chunks(engine, requests, versions, results, batch_tokens)
        return results
    batch: RequestBatch[LoadedAdapter] = RequestBatch()
    for request, out in zip(requests, results, strict=True):
        version = versions[request.domain]
        batch.add(version.encoder.encode(request), version.adapter, out)
    batch.run(partial(engine.predict, batch_tokens=batch_tokens))
    return results


def _predict_in_chunks(
    engine: Engine,
    requests: Sequence[Request],
    versions: Versions,
    results: Sequence[np.ndarray],
    batch_tokens: int,
) -> None:
    # First pass: validate everything, and keep only the prefixes.
    total = sum(map(len, results))
    with _bar("checking", total) as bar:
        prefixes = [
            _check(request, versions[request.domain].encoder, len(out), bar)
            for request, out in zip(requests, results, strict=True)
        ]
    # Second pass: encode again, and compute whenever the batch is full.
    with _bar("scoring", total) as bar:
        batch: RequestBatch[LoadedAdapter] = RequestBatch()
        for number in _order(requests, versions, prefixes):
            request, out, version = requests[number], results[number], versions[requests[number].domain]
            for first, candidates in request.chunks(CHUNK, len(out)):
                with request.named():
                    encoded = version.encoder.encode_candidates(prefixes[number], candidates, first)
                batch.add(encoded, version.adapter, out[first : first + len(candidates)])
                if batch.distinct >= CHUNK or batch.requested >= REPEATS * CHUNK:
                    _run(batch, engine, batch_tokens, bar)
                    batch = RequestBatch()
        _run(batch, engine, batch_tokens, bar)


def _check(request: Request, encoder: RequestEncoder, count: int, bar: tqdm) -> Prefix:
    """Encode all candidates of a request without keeping them; returns its prefix."""
    with request.named():
        prefix = encoder.encode_history(request.history, request.user)
    for first, candidates in request.chunks(CHUNK, count):
        with request.named():
            encoder.encode_candidates(prefix, candidates, first)
        bar.update(len(candidates))
    return prefix


def _run(batch: RequestBatch[LoadedAdapter], engine: Engine, batch_tokens: int, bar: tqdm) -> None:
    goal = bar.n + batch.requested
    batch.run(partial(engine.predict, batch_tokens=batch_tokens, progress=bar.update))
    bar.update(goal - bar.n)  # repeated candidates are computed once


def _order(requests: Sequence[Request], versions: Versions, prefixes: Sequence[Prefix]) -> list[int]:
    """Numbers of the requests, those of one adapter and history together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (request, prefix) in enumerate(zip(requests, prefixes, strict=True)):
        history = hash(np.concatenate(prefix.pieces()).tobytes())
        groups.setdefault((id(versions[request.domain].adapter), history), []).append(number)
    return [number for numbers in groups.values() for number in numbers]


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="candidate", delay=2)
