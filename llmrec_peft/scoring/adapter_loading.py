"""Reading the adapter of a bundle for a base that is in memory already."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmrec_peft.checkpoints.adapter_checks import check_bundle, check_shapes, plain_options, read_state, reading
from llmrec_peft.checkpoints.checksum import digest
from llmrec_peft.checkpoints.manifest import read_options
from llmrec_peft.checkpoints.manifest_schema import MANIFEST, WEIGHTS
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import BundleError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.models.bottleneck import BottleneckAdapter, find_layout, transformer_layers
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.fingerprints import fits
from llmrec_peft.models.quantization import quantization_of
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.models.safetensors_header import TensorEntry
from llmrec_peft.models.stock_parts import head_name
from llmrec_peft.models.tuning_options import AdapterOptions, HeadOptions, LoraOptions
from llmrec_peft.scoring.adapter_layers import AdapterLayer, Bias, Bottleneck, LowRank, count_bytes, dora_ratio
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter
from llmrec_peft.scoring.shared_base import SharedBase

_PEFT_PREFIX = "base_model.model."


def precision_of(directory: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Number format of a bundle's base in training: the dtype, and the 4-bit storage if any."""
    tuning, options = read_options(directory, manifest)
    quantization = quantization_of(tuning, options)
    return {"dtype": options.dtype, "quantization": None if quantization is None else dataclasses.asdict(quantization)}


def load_adapter(directory: str | Path, base: SharedBase, *, any_dtype: bool = False) -> LoadedAdapter:
    """Read a bundle for a base that is loaded already, with all the checks of `load_trained`. The base does not change.

    Args:
        directory: directory of the bundle.
        base: as it is in memory.
        any_dtype: accept a base in another number format than the bundle was trained with.

    Raises:
        BundleError: a damaged bundle, another base, tokenizer or precision, or a method that has weights of its own.
        ModelError: a base whose positions, windows or RoPE do not fit the domain's `stream.max_length`.
    """
    directory = Path(directory)
    manifest, entries = check_bundle(directory)
    with reading(directory):
        return _read_adapter(directory, manifest, entries, base, any_dtype)


def _read_adapter(
    directory: Path, manifest: Mapping[str, Any], entries: Mapping[str, TensorEntry], base: SharedBase, any_dtype: bool
) -> LoadedAdapter:
    stock = base.classifier.stock
    tuning, _ = read_options(directory, manifest)
    precision = precision_of(directory, manifest)
    _check_base(directory, manifest, base, precision | ({"dtype": base.precision["dtype"]} if any_dtype else {}))
    plain = plain_options(tuning) if isinstance(tuning, LoraOptions) else tuning
    check_shapes(directory / WEIGHTS, stock, plain, entries)
    state = read_state(directory / WEIGHTS)
    if isinstance(tuning, LoraOptions):
        state = {name.removeprefix(_PEFT_PREFIX): value for name, value in state.items()}
    head = state.pop(f"{head_name(stock)}.weight", None)
    labels, width = len(manifest["labels"]), base.classifier.config.get_text_config().hidden_size
    if head is None or tuple(head.shape) != (labels, width):
        raise BundleError(
            f"{directory / WEIGHTS} must hold a head of shape {(labels, width)}, not "
            f"{None if head is None else tuple(head.shape)}; restore the files that training wrote"
        )
    if isinstance(tuning, LoraOptions):
        layers = _low_rank(directory, state, tuning, base.classifier)
    elif isinstance(tuning, AdapterOptions):
        layers = _bottlenecks(directory, state, tuning, base.classifier, width)
    elif isinstance(tuning, HeadOptions):
        layers = {}
        _refuse_rest(directory, state)
    else:
        raise BundleError(
            f"bundle {directory} was trained by method {manifest['method']}, which has a base of its own and cannot "
            "share one; merge it and serve the merged model"
        )
    domain = Domain.of_manifest(manifest["domain"], source=str(directory / MANIFEST))
    check_positions(base.classifier.config, domain.stream.max_length)
    device = base.classifier.device
    head = head.float().to(device)
    return LoadedAdapter(
        directory=directory,
        version=digest(manifest),  # the same weights at another scale are another version
        vocabulary=Vocabulary(domain, base.tokenizer),
        calibration=Calibration.from_dict(manifest["calibration"]),
        head=head,
        layers=layers,
        size=count_bytes(layers, head),
    )


def _check_base(directory: Path, manifest: Mapping[str, Any], base: SharedBase, precision: Mapping[str, Any]) -> None:
    stated = str(manifest["base"].get("fingerprint"))
    if stated != base.fingerprint:
        raise BundleError(
            f"bundle {directory} was trained on {manifest['base'].get('name')} with fingerprint {stated[:16]}..., but "
            f"base {base.name} has {base.fingerprint[:16]}...; serve it on the base that it was trained on"
        )
    stated = str(manifest["tokenizer"].get("fingerprint"))
    if stated != base.tokenizer_fingerprint and not fits(base.tokenizer, stated):
        raise BundleError(
            f"bundle {directory} was trained with a tokenizer of fingerprint {stated[:16]}..., but that of base "
            f"{base.name} has {base.tokenizer_fingerprint[:16]}...; use the base's own tokenizer files"
        )
    for key, value in precision.items():
        if value != base.precision[key]:
            raise BundleError(
                f"bundle {directory} was trained on a base with {key} {value!r}, but this one has "
                f"{base.precision[key]!r}; serve it on a base of its own"
            )


def _low_rank(
    directory: Path, state: dict[str, torch.Tensor], tuning: LoraOptions, classifier: BehaviorClassifier
) -> dict[str, list[AdapterLayer]]:
    """Adapter layers of a LoRA bundle."""
    plain = plain_options(tuning)
    rank, alpha = plain.r, plain.alpha
    scale = alpha / (rank**0.5 if tuning.rslora else rank)
    modules, device = dict(classifier.stock.named_modules()), classifier.device
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path in sorted({name.rsplit(".lora_", 1)[0] for name in state if ".lora_" in name}):
        a, b = (state.pop(f"{path}.lora_{part}.weight", None) for part in "AB")
        if path not in modules or a is None or b is None or a.shape[0] != rank or tuple(b.shape)[1:] != (rank,):
            shapes = [None if part is None else tuple(part.shape) for part in (a, b)]
            raise BundleError(
                f"{directory / WEIGHTS} has for {path!r} the low-rank factors {shapes}, and rank {rank} of a module of "
                "the base belongs there; restore the files that training wrote"
            )
        factors[path] = (a.float().to(device), b.float().to(device))
    layers: dict[str, list[AdapterLayer]] = {}
    for path, (a, b) in factors.items():
        ratio, bias = None, getattr(modules[path], "bias", None)
        if tuning.dora:
            magnitude = state.pop(f"{path}.lora_magnitude_vector").float().to(device)
            ratio = dora_ratio(modules[path], a, b, scale, magnitude)
        layers[path] = [LowRank(a, b, scale, ratio, None if bias is None else bias.detach().float())]
    for name in [name for name in state if name.endswith(".bias")]:
        path = name.removesuffix(".bias").removesuffix(".base_layer")
        own = getattr(modules.get(path), "bias", None)
        value = state.pop(name)
        if own is None or own.shape != value.shape:
            raise BundleError(f"{directory / WEIGHTS} has {name!r}, which the base lacks; restore the file")
        layers.setdefault(path, []).append(Bias(value.float().to(device) - own.detach().float()))
    _refuse_rest(directory, state)
    return layers


def _bottlenecks(
    directory: Path, state: dict[str, torch.Tensor], tuning: AdapterOptions, classifier: BehaviorClassifier, width: int
) -> dict[str, list[AdapterLayer]]:
    """Adapter layers of a bottleneck bundle."""
    find_layout(transformer_layers(classifier.stock)[0])
    modules, device = dict(classifier.stock.named_modules()), classifier.device
    layers: dict[str, list[AdapterLayer]] = {}
    for path in sorted({name.split(".adapter.")[0] for name in state if ".adapter." in name}):
        adapter = BottleneckAdapter(width, tuning)
        shapes = {name: value.shape for name, value in adapter.state_dict().items()}
        own = {name: state.pop(f"{path}.adapter.{name}") for name in shapes if f"{path}.adapter.{name}" in state}
        if {name: value.shape for name, value in own.items()} != shapes or path not in modules:
            raise BundleError(
                f"{directory / WEIGHTS} has no adapter of width {width} and size {tuning.size} for {path!r}; restore "
                "the files that training wrote"
            )
        adapter.load_state_dict(own)
        layers[path] = [Bottleneck(adapter.to(device), tuning.placement == "parallel")]
    _refuse_rest(directory, state)
    return layers


def _refuse_rest(directory: Path, state: Mapping[str, torch.Tensor]) -> None:
    if state:
        raise BundleError(
            f"{directory / WEIGHTS} has an unknown tensor {min(state)!r} ({len(state)} in all); train again or copy it "
            "again"
        )
