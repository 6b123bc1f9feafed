"""Adapter bundles: what one domain's training yields, written whole or not at all.

A bundle is a directory of three files and a model card. `adapter_config.json` and `adapter_model.safetensors` are
PEFT's for `lora` and `qlora`, so PEFT alone can load them; the other methods write the same names with their own
contents, and a `peft_type` of BOTTLENECK, HEAD or FULL. `behavior.json` describes base, domain and training, and
loading checks all of it. The card is for people and the Hub, and is never read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrec_peft.checkpoints.adapter_checks import adapted_names, weights_metadata
from llmrec_peft.checkpoints.adapter_tensors import adapter_config, adapter_tensors, check_whole, check_written
from llmrec_peft.checkpoints.checksum import sha256
from llmrec_peft.checkpoints.directory_checks import read_json
from llmrec_peft.checkpoints.manifest import (
    check_calibration,
    check_domain,
    installed,
    is_merged,
    is_pattern,
    write_manifest,
)
from llmrec_peft.checkpoints.manifest_schema import ADAPTER, CONFIG, MANIFEST, WEIGHTS
from llmrec_peft.checkpoints.model_card import CARD, bundle_card
from llmrec_peft.errors import BundleError, output_errors
from llmrec_peft.files import move_into_place, scratch_directory, write_json
from llmrec_peft.models.base import base_source, resolve_base
from llmrec_peft.models.base_weights import base_fingerprint
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.end_token import tokens_around
from llmrec_peft.models.fingerprints import tokenizer_fingerprint
from llmrec_peft.models.head import outcomes_of
from llmrec_peft.models.tensor_files import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Bundle:
    """A loaded bundle, merged model or student: the classifier in eval mode, and what its behavior.json holds."""

    classifier: BehaviorClassifier
    tokenizer: PreTrainedTokenizerBase
    domain: dict[str, Any]
    manifest: dict[str, Any]
    calibration: dict[str, Any] | None


@dataclass(frozen=True)
class TrainingRecord:
    """What a manifest stores of a training run.

    Attributes:
        calibration: temperature and bias; None for the plain softmax.
        counts: sizes of the training data.
        metrics: metrics of each split.
    """

    calibration: Mapping[str, Any] | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """The entries of the manifest."""
        return {
            "calibration": None if self.calibration is None else dict(self.calibration),
            "counts": dict(self.counts),
            "metrics": dict(self.metrics),
        }


def domain_entries(domain: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a manifest that follow from the domain's mapping."""
    outcomes = outcomes_of(domain)
    return {
        "domain": dict(domain),
        "labels": list(outcomes),
        "words": list(outcomes.values()),
        "stream": dict(domain.get("stream") or {}),
    }


def save_bundle(
    directory: str | Path,
    classifier: BehaviorClassifier,
    tokenizer: PreTrainedTokenizerBase,
    domain: Mapping[str, Any],
    record: TrainingRecord | None = None,
    *,
    base: str | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a bundle and return its directory, which appears whole or not at all; one that exists is replaced.

    Args:
        domain: the domain's plain mapping, with `outcomes` and `stream`.
        record: calibration, counts and metrics of the training run.
        base: name of the base to store; that of the classifier if None.
        state: tensors to write instead of the classifier's (names of `trainable_state_dict`), for sharded training.

    Raises:
        BundleError: the directory holds something else or a merged model, labels and domain differ, the calibration is
            out of bounds, a tensor is not whole, or what was written cannot be read back.
    """
    directory, record = Path(directory), record or TrainingRecord()
    if classifier.model_options is None or classifier.method_options is None:
        raise BundleError("this classifier does not know its options; make it with load_classifier to save it")
    check_domain(domain, f"bundle {directory}")
    check_calibration(record.calibration, len(classifier.labels), f"bundle {directory}")
    if list(outcomes_of(domain)) != classifier.labels:
        raise BundleError(
            f"domain has the outcomes {list(outcomes_of(domain))}, the classifier the labels {classifier.labels}; "
            "save it with the domain it was trained on"
        )
    _check_place(directory)
    check_whole(classifier, state)
    writing = output_errors(BundleError, f"bundle {directory}", "make room or choose another directory")
    with writing, scratch_directory(directory) as scratch:
        base = base or classifier.base
        tensors = adapter_tensors(classifier, state)
        manifest = _manifest(classifier, tokenizer, dict(domain), base, record)
        save_tensors(tensors, scratch / WEIGHTS, weights_metadata(manifest))
        write_json(adapter_config(classifier, base), scratch / CONFIG)
        check_written(scratch / WEIGHTS, tensors, classifier)
        manifest["files"] = {name: sha256(scratch / name) for name in (CONFIG, WEIGHTS)}
        manifest = write_manifest(scratch, manifest, ADAPTER)
        (scratch / CARD).write_text(bundle_card(manifest), encoding="utf-8")
        scratch.chmod(0o755)
        move_into_place(scratch, directory)
    return directory


def _manifest(
    classifier: BehaviorClassifier,
    tokenizer: PreTrainedTokenizerBase,
    domain: dict[str, Any],
    base: str,
    record: TrainingRecord,
) -> dict[str, Any]:
    """Entries of behavior.json, but the checksums of the files."""
    assert classifier.model_options is not None and classifier.method_options is not None  # save_bundle has checked
    options = dataclasses.asdict(classifier.model_options) | {"base": base}
    tuning = dataclasses.asdict(classifier.method_options)
    if is_pattern(tuning.get("target_modules")):
        tuning["target_modules"] = adapted_names(classifier.stock)
    source = resolve_base(base, options["gguf_file"])
    return {
        "method": classifier.method,
        "method_options": tuning,
        "model_options": options,
        "base": {
            "name": base,
            "source": base_source(base),
            "fingerprint": base_fingerprint(source, trust_remote_code=options["trust_remote_code"]),
        },
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            **tokens_around(tokenizer, encoder=classifier.encoder),
        },
        **domain_entries(domain),
        **record.entries(),
        "versions": installed("llmrec_peft", "torch", "transformers", "peft"),
    }


def _check_place(directory: Path) -> None:
    """Refuse a directory that holds anything but a bundle; a damaged bundle may be replaced."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    if is_merged(directory):
        raise BundleError(f"{directory} is a merged model, so no bundle replaces it; choose another directory")
    if not (directory / MANIFEST).is_file():
        raise BundleError(f"{directory} exists and is not a bundle, so it is not replaced; choose another directory")
    if not (directory / CONFIG).is_file():
        try:
            read_json(directory / MANIFEST)
        except BundleError:
            raise BundleError(
                f"{directory / MANIFEST} cannot be read, and without {CONFIG} beside it {directory} may be a merged "
                "model, so it is not replaced; choose another directory"
            ) from None
