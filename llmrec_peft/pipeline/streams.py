"""From a configuration's log to the streams of its splits."""

import hashlib
from dataclasses import dataclass

import numpy as np

from ..config import DataConfig
from ..data.domain import Domain
from ..data.log import BehaviorLog
from ..data.splits import Splits, check_leakage
from ..data.streams import IndependentPrompts, StreamDataset, build_streams

SIMULATED_SHOP = "simulated:shop"


@dataclass(frozen=True)
class SplitStreams:
    """One log, split, and the streams of each split."""

    log: BehaviorLog
    splits: Splits
    train: StreamDataset
    valid: StreamDataset
    test: StreamDataset

    def __getitem__(self, name: str) -> StreamDataset:
        return getattr(self, name)

    def counts(self) -> dict[str, dict[str, int]]:
        """Users, targets, streams and tokens of each split, as the bundle and the report state them."""
        return {name: _counts(self[name]) for name in self.splits}

    def fingerprint(self) -> str:
        """Hash of what training sees: windows, targets and their tokens."""
        digest = hashlib.sha256()
        for array in (self.train.lengths, self.train.target_rows, self.train.target_items, self.train.target_labels):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        for number in np.linspace(0, len(self.train) - 1, 16).astype(int):
            digest.update(self.train[int(number)].input_ids.tobytes())
        return digest.hexdigest()


def _counts(streams: StreamDataset) -> dict[str, int]:
    users = streams.log.user_codes[streams.target_rows]
    labels = np.bincount(streams.target_labels, minlength=len(streams.domain.labels)).tolist()
    return {
        "users": len(np.unique(users)),
        "targets": streams.num_targets,
        **{f"targets labelled {name}": count for name, count in zip(streams.domain.labels, labels, strict=True)},
        "sampled negatives": int(streams.sampled.sum()),
        "streams": len(streams),
        "tokens": int(streams.lengths.sum()),
        "history events that did not fit": streams.dropped_context,
    }


def read_log(data: DataConfig) -> BehaviorLog:
    """The log that a configuration names; `simulated:shop` draws one, and says so."""
    if data.path == SIMULATED_SHOP:
        from ..data.simulate import simulate_shop

        print("data: a simulated shop (its users and products are made up)")
        return simulate_shop()
    return BehaviorLog.read(data.path, format=data.format)


def build_splits(log: BehaviorLog, domain: Domain, tokenizer) -> SplitStreams:
    """Split a log as its domain says, check for leaks, and cut each split into streams.

    Splits and sampled negatives depend on the log and the domain alone, so that runs with different seeds are measured
    on the same targets.
    """
    splits = log.split(by=domain.split.by, valid=domain.split.valid, test=domain.split.test)
    check_leakage(splits)
    # Between users there is no past: only training rows may tell which items are popular.
    source = splits.train.rows if domain.split.by == "user" else None
    parts = {name: build_streams(split, domain, tokenizer, source=source) for name, split in splits.items()}
    return SplitStreams(log, splits, **parts)


def limited(streams: StreamDataset, targets: int | None, classifier):
    """At most about so many targets in whole streams; one prompt a target for models that read both ways."""
    part = streams.limited(targets)
    return IndependentPrompts(part) if classifier.encoder else part
