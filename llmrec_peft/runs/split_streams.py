"""From the log that a configuration names to its splits, and from each split to its streams."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec_peft.config.schema import DataConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.leakage import check_leakage
from llmrec_peft.data.log import BehaviorLog, Splits
from llmrec_peft.data.streams import IndependentPrompts, StreamDataset, Streams, build_streams
from llmrec_peft.errors import DataError
from llmrec_peft.models.base import base_fingerprint
from llmrec_peft.models.classifier import BehaviorClassifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIMULATED_SHOP = "simulated:shop"
HASHED_AT_ONCE = 1 << 22  # numbers


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

    def fingerprint(self, base: str, *, valid: bool, trust_remote_code: bool = False) -> str:
        """Hash of what training reads: windows, targets, every token, and the base's weights.

        Args:
            base: as `resolve_base` returns it.
            valid: hash the validation streams too, since they choose the checkpoint.
            trust_remote_code: allow code that comes with the base to run.
        """
        digest = hashlib.sha256(base_fingerprint(base, trust_remote_code=trust_remote_code).encode())
        for streams in (self.train, self.valid) if valid else (self.train,):
            for array in streams.contents():
                digest.update(f"{array.dtype}{array.shape}".encode())
                flat = array.reshape(-1)
                # In pieces, as the tokens may lie on disk.
                for start in range(0, len(flat), HASHED_AT_ONCE):
                    digest.update(np.ascontiguousarray(flat[start : start + HASHED_AT_ONCE]).data)
        return digest.hexdigest()

    def split_note(self) -> dict[str, Any]:
        """How the log was split, for the bundle; `check_split` reads it."""
        boundaries = self.splits.boundaries
        return {"by": self.splits.by, "boundaries": None if boundaries is None else list(boundaries)}


def _counts(streams: StreamDataset) -> dict[str, int]:
    users = streams.log.user_codes[streams.target_rows]
    labels = np.bincount(streams.target_labels + 1, minlength=len(streams.domain.labels) + 1).tolist()
    unlabelled = labels.pop(0)
    return {
        "users": len(np.unique(users)),
        "targets": streams.num_targets,
        **{f"targets labelled {name}": count for name, count in zip(streams.domain.labels, labels, strict=True)},
        **({"targets without a label": unlabelled} if unlabelled else {}),
        "sampled negatives": int(streams.sampled.sum()),
        "streams": len(streams),
        "tokens": int(streams.lengths.sum()),
        "history events that did not fit": streams.dropped_context,
    }


def read_log(data: DataConfig) -> BehaviorLog:
    """Read the log that a configuration names; `simulated:shop` draws one and prints that it is simulated."""
    if data.path == SIMULATED_SHOP:
        from llmrec_peft.data.simulate import simulate_shop

        print("data: a simulated shop (its users and products are made up)")
        return simulate_shop()
    return BehaviorLog.read(data.path, format=data.format, null_times=data.null_times)


def split_by_domain(log: BehaviorLog, domain: Domain) -> Splits:
    """Split a log by the domain's rule, and check that no split leaks into another."""
    splits = log.split(by=domain.split.by, valid=domain.split.valid, test=domain.split.test)
    check_leakage(splits)
    return splits


def streams_for_split(
    splits: Splits, name: str, domain: Domain, tokenizer: "PreTrainedTokenizerBase", *, unlabelled: bool = False
) -> StreamDataset:
    """Cut one split into streams; `unlabelled` as `build_streams` takes it."""
    # A split by user has no order in time: only training rows may tell which items are popular.
    source = splits.train.rows if domain.split.by == "user" else None
    return build_streams(splits[name], domain, tokenizer, source=source, unlabelled=unlabelled)


def build_split_streams(
    log: BehaviorLog, domain: Domain, tokenizer: "PreTrainedTokenizerBase", *, unlabelled: bool = False
) -> SplitStreams:
    """Split a log by the domain's rule, check for leaks, and cut each split into streams.

    Splits and sampled negatives depend on the log and the domain alone, so that runs with different seeds are measured
    on the same targets. With `unlabelled`, training rows that the domain leaves out are targets too, of class -1.
    """
    splits = split_by_domain(log, domain)
    return SplitStreams(
        log,
        splits,
        train=streams_for_split(splits, "train", domain, tokenizer, unlabelled=unlabelled),
        valid=streams_for_split(splits, "valid", domain, tokenizer),
        test=streams_for_split(splits, "test", domain, tokenizer),
    )


def check_classes(train: StreamDataset) -> None:
    """Raise DataError where all training targets have one label: a classifier cannot learn from them."""
    found = np.unique(train.target_labels[train.target_labels >= 0])
    if len(found) < 2:
        named = f"all labelled '{train.domain.labels[int(found[0])]}'" if len(found) else "none of them labelled"
        raise DataError(
            f"train of log {train.log.name!r} has {train.num_targets} targets, {named}, "
            "and training needs a second label; check the domain's label, "
            "give a longer training period, or set negatives"
        )


def check_split(splits: Splits, name: str, note: Mapping[str, Any] | None) -> None:
    """Refuse validation or test rows that the run may have trained on.

    A split by user cannot be checked: a bundle does not list its users.

    Args:
        splits: the splits of the log that is scored now.
        name: the split that is scored.
        note: `SplitStreams.split_note` of the run that trained, from its bundle; None where the bundle has none.

    Raises:
        DataError: the split begins earlier than that split of the run.
    """
    boundaries = (note or {}).get("boundaries")
    if boundaries is None or name == "train":
        return
    allowed = boundaries[0 if name == "valid" else 1]
    rows = splits[name].rows
    first = splits.train.log.timestamps[rows].min()
    if first < allowed:
        raise DataError(
            f"{name} of log {splits.train.log.name!r} begins at time {first}, but the bundle's {name} began at "
            f"{allowed}, so that it was trained or chosen on rows in between; use the full log that it was trained on, "
            f"a later one, or --split train"
        )


def limit_targets(streams: StreamDataset, targets: int | None, classifier: BehaviorClassifier) -> Streams:
    """About `targets` targets in whole streams; a prompt for each target where the base is a bidirectional encoder."""
    part = streams.limited(targets)
    return IndependentPrompts(part) if classifier.encoder else part
