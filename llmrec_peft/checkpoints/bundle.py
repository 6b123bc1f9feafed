"""Adapter bundles: what one domain's training yields, written whole and read strictly.

A bundle is a directory of three files and a model card. `adapter_config.json` and `adapter_model.safetensors` are
PEFT's for `lora` and `qlora`, so PEFT alone can load them; the other methods write the same names with their own
contents, and a `peft_type` of BOTTLENECK, HEAD or FULL. `behavior.json` says what they belong to, and loading checks
all that it says. The card is for people and the Hub, and is never read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmrec_peft.checkpoints.bundle_checks import (
    PEFT_TYPES,
    adapted_names,
    check_adapter,
    check_names,
    check_shapes,
    compare_config,
    plain_options,
    read_state,
)
from llmrec_peft.checkpoints.manifest import (
    CONFIG,
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    check_calibration,
    check_domain,
    installed,
    is_merged,
    is_pattern,
    read_manifest,
    read_options,
    refuse_merged,
    weights_metadata,
)
from llmrec_peft.checkpoints.model_card import CARD, bundle_card
from llmrec_peft.checkpoints.sealing import sealed, sha256
from llmrec_peft.errors import BundleError, ModelError, input_errors, output_errors
from llmrec_peft.files import move_into_place, plain, scratch_directory, write_json
from llmrec_peft.messages import shortened
from llmrec_peft.models.base import BASES, base_fingerprint, base_source, head_name, load_tokenizer, resolve_base
from llmrec_peft.models.classifier import BehaviorClassifier, build_classifier
from llmrec_peft.models.fingerprints import fits, short, tokenizer_fingerprint
from llmrec_peft.models.head import outcomes_of
from llmrec_peft.models.model_files import check_links, read_json, stray_weights
from llmrec_peft.models.prompt_tokens import tokens_around
from llmrec_peft.models.sharding import is_split, whole_shape
from llmrec_peft.models.tensor_files import TensorEntry, read_header, save_tensors
from llmrec_peft.models.tuning_options import LoraOptions, ModelOptions


@dataclass
class Bundle:
    """A loaded bundle: the classifier in eval mode, its tokenizer, domain and calibration, and all of behavior.json."""

    classifier: BehaviorClassifier
    tokenizer: Any
    domain: dict[str, Any]
    manifest: dict[str, Any]
    calibration: dict[str, Any] | None


def save_bundle(
    directory: str | Path,
    classifier: BehaviorClassifier,
    tokenizer: Any,
    domain: Mapping[str, Any],
    *,
    base: str | None = None,
    calibration: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a bundle and return its directory, which appears whole or not at all; one that exists is replaced.

    Args:
        domain: the domain's plain mapping, with `outcomes` and `stream`.
        base: name of the base to record; the classifier's own if None.
        state: tensors to write in place of the classifier's (names of `trainable_state_dict`), for sharded training.

    Raises BundleError if the directory holds something else or a merged model, if labels and domain differ, if the
    calibration is unsound, if a tensor is not whole, or if what was written cannot be read back.
    """
    directory = Path(directory)
    if classifier.model_options is None or classifier.method_options is None:
        raise BundleError("this classifier does not know its options; make it with load_classifier to save it")
    check_domain(domain, f"bundle {directory}")
    check_calibration(calibration, len(classifier.labels), f"bundle {directory}")
    if list(outcomes_of(domain)) != classifier.labels:
        raise BundleError(
            f"domain has the outcomes {list(outcomes_of(domain))}, the classifier the labels {classifier.labels}; "
            "save it with the domain it was trained on"
        )
    _check_place(directory)
    _check_whole(classifier, state)
    writing = output_errors(BundleError, f"bundle {directory}", "make room or choose another directory")
    with writing, scratch_directory(directory) as scratch:
        base = base or classifier.base
        tensors = adapter_tensors(classifier, state)
        manifest = _manifest(classifier, tokenizer, dict(domain), base, calibration, counts, metrics)
        save_tensors(tensors, scratch / WEIGHTS, weights_metadata(manifest))
        write_json(adapter_config(classifier, base), scratch / CONFIG)
        _check_written(scratch / WEIGHTS, tensors, classifier)
        manifest["files"] = {name: sha256(scratch / name) for name in (CONFIG, WEIGHTS)}
        manifest = sealed(plain(manifest))
        write_json(manifest, scratch / MANIFEST)
        (scratch / CARD).write_text(bundle_card(manifest), encoding="utf-8")
        scratch.chmod(0o755)
        move_into_place(scratch, directory)
    return directory


def check_bundle(directory: str | Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Check a bundle's files against each other; returns its manifest and where its tensors lie. No base is read.

    Raises BundleError as `load_bundle` does for what needs no base.
    """
    directory = Path(directory)
    with reading(directory):
        refuse_merged(directory)
        _check_files(directory)
        manifest = read_manifest(directory)
        return manifest, check_adapter(directory, manifest)


def reading(directory: Path) -> AbstractContextManager[None]:
    """Turn what a library raises on a bundle's files into a BundleError of one line."""
    return input_errors(BundleError, f"bundle {directory}", "restore the files that training wrote")


def load_bundle(
    directory: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
    mapped: bool = False,
) -> Bundle:
    """Read a bundle, checking everything that it says against its files and the base.

    Args:
        base: where the base lies, if not where the bundle says; its weights must be the same.
        dtype, attn: replace the model options that the bundle was trained with.
        trust_remote_code: allow the base's own code to run; a bundle cannot allow it by itself.
        mapped: leave the weights of method full in their file's pages, which take no memory of their own. Where they
            lie decides how kernels round, so that answers may differ in the last bit from those in training.

    Raises BundleError naming both values of any mismatch.
    """
    directory = Path(directory)
    manifest, entries = check_bundle(directory)
    overrides = {"base": base, "dtype": dtype, "attn": attn}
    changed = {key: value for key, value in overrides.items() if value is not None}
    if base is not None:
        changed["gguf_file"] = None
    stored = manifest["model_options"] | changed
    if stored.get("trust_remote_code") and not trust_remote_code:
        raise BundleError(
            f"{directory} asks to run code that comes with its base; pass trust_remote_code=True if wanted"
        )
    tuning, options = read_options(directory, manifest, stored)
    if isinstance(tuning, LoraOptions):
        tuning = plain_options(tuning)
    with reading(directory):
        tokenizer = _check_base(directory, manifest, options)
        classifier = build_classifier(
            options, tuning, outcomes_of(manifest["domain"]), trained=True, tokenizer=tokenizer,
            check=lambda stock: check_shapes(directory / WEIGHTS, stock, tuning, entries),
        )  # fmt: skip
        _check_config(directory, classifier)
        _load_tensors(directory, classifier, entries, mapped)
    return Bundle(classifier.eval(), classifier.tokenizer, manifest["domain"], manifest, manifest["calibration"])


def adapter_tensors(
    classifier: BehaviorClassifier, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of adapter_model.safetensors, on the CPU; for LoRA under PEFT's names and fitting the untouched base."""
    if isinstance(classifier.method_options, LoraOptions):
        from peft import get_peft_model_state_dict

        from llmrec_peft.models.lora import plain_factors

        given = None if state is None else dict(state)
        tensors = get_peft_model_state_dict(classifier.model, state_dict=given, save_embedding_layers=False)
        # With bias "all" PEFT also lists the biases of the modules that it saves whole, under their paths inside its
        # wrapper: the frozen original, and the trained copy, which is there under its own name already.
        inside = (".original_module.", ".modules_to_save.")
        tensors = {name: value for name, value in tensors.items() if not any(part in name for part in inside)}
        tensors = plain_factors(tensors, classifier.initial_factors)
    else:
        tensors = dict(classifier.trainable_state_dict() if state is None else state)
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def adapter_config(classifier: BehaviorClassifier, base: str) -> dict[str, Any]:
    """Contents of adapter_config.json."""
    if isinstance(classifier.method_options, LoraOptions):
        from llmrec_peft.models.lora import plain_config

        config = classifier.model.peft_config["default"]
        config = plain_config(config) if classifier.initial_factors else config
        # Loading needs no start for the tensors, and some starts would change the base again.
        values = config.to_dict() | {"inference_mode": True, "init_lora_weights": True}
        if is_pattern(values["target_modules"]):
            values["target_modules"] = adapted_names(classifier.stock)
    else:
        options = dataclasses.asdict(classifier.method_options)
        values = {"peft_type": PEFT_TYPES[classifier.method], "task_type": "SEQ_CLS", **options}
    # PEFT looks for this name on the Hub or among paths, where an embedded name is neither.
    values["base_model_name_or_path"] = BASES[base].hub_id if base in BASES else base
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def _manifest(
    classifier: BehaviorClassifier, tokenizer: Any, domain: dict[str, Any], base: str, calibration, counts, metrics
) -> dict[str, Any]:
    options = dataclasses.asdict(classifier.model_options) | {"base": base}
    tuning = dataclasses.asdict(classifier.method_options)
    if is_pattern(tuning.get("target_modules")):
        tuning["target_modules"] = adapted_names(classifier.stock)
    source = resolve_base(base, options["gguf_file"])
    outcomes = outcomes_of(domain)
    return {
        "format_version": FORMAT_VERSION,
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
        "domain": domain,
        "labels": list(outcomes),
        "words": list(outcomes.values()),
        "stream": dict(domain.get("stream") or {}),
        "calibration": None if calibration is None else dict(calibration),
        "counts": dict(counts or {}),
        "metrics": dict(metrics or {}),
        "versions": installed("llmrec_peft", "torch", "transformers", "peft"),
    }


def _check_place(directory: Path) -> None:
    """Refuse a directory that holds anything but a bundle; a damaged bundle may be replaced."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    if is_merged(directory):
        raise BundleError(f"{directory} is a merged model, so no bundle replaces it; choose another directory")
    if not (directory / MANIFEST).is_file():
        raise BundleError(f"{directory} exists and is no bundle, so it is not replaced; choose another directory")
    if not (directory / CONFIG).is_file():
        try:
            read_json(directory / MANIFEST)
        except BundleError:
            raise BundleError(
                f"{directory / MANIFEST} cannot be read, and without {CONFIG} beside it {directory} may be a merged "
                "model, so it is not replaced; choose another directory"
            ) from None


def _check_whole(classifier: BehaviorClassifier, state: Mapping[str, torch.Tensor] | None) -> None:
    """Refuse tensors that are a rank's part, or that are missing: they load without a word and answer at random."""
    trained = {name: value for name, value in classifier.model.named_parameters() if value.requires_grad}
    if state is None:
        parts = [name for name, value in trained.items() if is_split(value)]
        if parts:
            raise BundleError(
                f"tensor {parts[0]!r} is split over ranks ({len(parts)} in all); call trainable_state_dict() on all "
                "ranks and pass its result as state"
            )
        return
    for name, value in trained.items():
        found = tuple(state[name].shape) if name in state else None
        if found != tuple(whole_shape(value)):
            raise BundleError(
                f"state has tensor {name!r} of shape {found}, and the classifier's is {tuple(whole_shape(value))}; "
                "pass what trainable_state_dict() returned on all ranks"
            )


def _check_written(path: Path, tensors: dict[str, torch.Tensor], classifier: BehaviorClassifier) -> None:
    """Read shapes and the head back from disk."""
    from safetensors import safe_open

    shapes = {name: entry.shape for name, entry in read_header(path).items()}
    for name in shapes.keys() | tensors.keys():
        if tuple(shapes.get(name, ())) != tuple(tensors[name].shape):
            raise BundleError(f"{path.name} does not hold {name} as trained; check the disk and save again")
    name = _head_tensor(classifier, tensors)
    rows = len(classifier.labels)
    if name is None or tensors[name].shape[0] != rows:
        shape = None if name is None else tuple(tensors[name].shape)
        raise BundleError(f"the head of {rows} rows is not among the trained tensors (found {shape}); gather it first")
    with safe_open(str(path), framework="pt") as file:
        if name not in file.keys() or not torch.equal(file.get_tensor(name), tensors[name]):  # noqa: SIM118
            raise BundleError(f"{path.name} does not hold the head {name} as trained; check the disk and save again")


def _head_tensor(classifier: BehaviorClassifier, names: Mapping[str, Any]) -> str | None:
    """Name of the head's weight matrix (of its last layer, if it has several) among tensor names."""
    head = f"{head_name(classifier.stock)}."
    found = [name for name in names if name.removeprefix("base_model.model.").startswith(head)]
    matrices = sorted(name for name in found if name.endswith("weight"))
    return matrices[-1] if matrices else None


def _check_files(directory: Path) -> None:
    """Refuse a bundle that lacks a file, holds weights that are not its own, or links out of its directory.

    Other files, such as a model card, are left alone: none of them is read.
    """
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a directory; name the bundle that a training run left")
    check_links(directory, "bundle")
    for name in FILES:
        if not (directory / name).is_file():
            raise BundleError(f"bundle {directory} has no {name}; copy the whole directory that training left")
    strange = stray_weights(directory, FILES)
    if strange:
        raise BundleError(
            f"bundle {directory} holds {strange[0]!r} beside {', '.join(FILES)}; weights lie in {WEIGHTS} alone, so "
            "remove it"
        )


def _check_base(directory: Path, manifest: dict[str, Any], options: ModelOptions) -> Any:
    """Compare the fingerprints of the base and of its tokenizer with the manifest's; returns the tokenizer."""
    trust = options.trust_remote_code
    try:
        source = resolve_base(options.base, options.gguf_file)
        found = base_fingerprint(source, trust_remote_code=trust)
        tokenizer = load_tokenizer(source, trust_remote_code=trust)
    except ModelError as error:
        raise BundleError(f"bundle {directory} cannot reach its base: {error}; or pass base=") from error
    said = manifest["base"].get("fingerprint")
    if found != said:
        raise BundleError(
            f"bundle {directory} was trained on {_told(manifest['base'])} with fingerprint {short(said)}, but base "
            f"{_told({'name': options.base, 'source': base_source(options.base)})} has {short(found)}; "
            "load it on the base that it was trained on"
        )
    said = manifest["tokenizer"].get("fingerprint")
    if not fits(tokenizer, said):
        raise BundleError(
            f"bundle {directory} was trained with a tokenizer of fingerprint {short(said)}, but that of base "
            f"{options.base} has {short(tokenizer_fingerprint(tokenizer))}; use the base's own tokenizer files"
        )
    return tokenizer


def _told(base: Mapping[str, Any]) -> str:
    """A base's name, and where its weights come from if the name leaves that open."""
    name, source = base.get("name"), base.get("source")
    return shortened(name, 300) if source in (None, name) else f"{shortened(name, 300)} (from {shortened(source, 300)})"


def _load_tensors(
    directory: Path, classifier: BehaviorClassifier, entries: dict[str, TensorEntry], mapped: bool
) -> None:
    path, own = directory / WEIGHTS, adapter_tensors(classifier)
    check_names(path, {name: tuple(value.shape) for name, value in own.items()}, entries)
    state = read_state(path)
    if isinstance(classifier.method_options, LoraOptions):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(classifier.model, state)
    elif mapped and classifier.method == "full":
        for name, value in classifier.model.named_parameters():
            value.data = state[name].to(value.device, value.dtype)
    else:
        classifier.load_trainable_state_dict(state)


def _check_config(directory: Path, classifier: BehaviorClassifier) -> None:
    """Compare adapter_config.json with what the manifest's options make on this base."""
    made = json.loads(json.dumps(adapter_config(classifier, ""), default=str))
    targets = getattr(classifier.method_options, "target_modules", None)
    if isinstance(targets, list) and read_json(directory / CONFIG).get("target_modules") == sorted(targets):
        made["target_modules"] = sorted(targets)  # PEFT shortens a long list
    compare_config(directory, made)
