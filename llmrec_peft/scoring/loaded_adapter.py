"""One bundle in memory, ready to share a base with others."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrec_peft.checkpoints.bundle import check_bundle, reading
from llmrec_peft.checkpoints.bundle_checks import check_shapes, plain_options, read_state
from llmrec_peft.checkpoints.manifest import FILES, MANIFEST, WEIGHTS, digest, read_options
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import BundleError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.models.base import check_positions, head_name
from llmrec_peft.models.bottleneck import BottleneckAdapter, find_layout, transformer_layers
from llmrec_peft.models.classifier import quantization_of
from llmrec_peft.models.fingerprints import fits
from llmrec_peft.models.tensor_files import TensorEntry
from llmrec_peft.models.tuning_options import AdapterOptions, HeadOptions, LoraOptions
from llmrec_peft.scoring.adapter_layers import Bias, Bottleneck, Delta, LowRank, count_bytes, dora_ratio

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One version of one bundle.

    Attributes:
        directory: where it was read.
        version: digest of what was read; another digest is another version.
        vocabulary: the domain's tokens.
        head: float32 [labels, hidden].
        deltas: from a module's path in the stock classifier to what changes its output, in order.
        size: bytes of all its tensors.
    """

    directory: Path
    version: str
    vocabulary: Vocabulary
    calibration: Calibration
    head: torch.Tensor
    deltas: Mapping[str, list[Delta]]
    size: int

    @property
    def domain(self) -> Domain:
        """The domain that it was trained on."""
        return self.vocabulary.domain

    @property
    def labels(self) -> list[str]:
        """Label names in class order."""
        return self.domain.labels


@dataclass(frozen=True)
class Base:
    """What a bundle is compared with: the base's stock classifier, its fingerprints and its precision."""

    stock: nn.Module
    tokenizer: Any
    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    precision: dict[str, Any]


def precision_of(directory: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How a bundle's base was held while it was trained: the dtype, and the 4-bit storage if any."""
    tuning, options = read_options(directory, manifest)
    quantization = quantization_of(tuning, options)
    return {"dtype": options.dtype, "quantization": None if quantization is None else dataclasses.asdict(quantization)}


def stamp(directory: Path) -> tuple[Any, ...]:
    """What tells without reading them that a bundle's files are those that were read: place, size, time of change."""
    found = [(directory / name).stat() for name in FILES]
    return (os.path.realpath(directory), *((part.st_ino, part.st_size, part.st_mtime_ns) for part in found))


def load_adapter(directory: str | Path, base: Base, *, any_dtype: bool = False) -> LoadedAdapter:
    """Read a bundle for a base that is loaded already, with all the checks of `load_bundle`; the base is left alone.

    `any_dtype` lets the base be in another number format than the bundle was trained with.

    Raises:
        BundleError: a damaged bundle, another base, tokenizer or precision, or a method that has weights of its own.
        ModelError: a base whose positions, windows or RoPE do not fit the domain's `stream.max_length`.
    """
    directory = Path(directory)
    manifest, entries = check_bundle(directory)
    with reading(directory):
        return _read_member(directory, manifest, entries, base, any_dtype)


def _read_member(
    directory: Path, manifest: Mapping[str, Any], entries: Mapping[str, TensorEntry], base: Base, any_dtype: bool
) -> LoadedAdapter:
    tuning, _ = read_options(directory, manifest)
    precision = precision_of(directory, manifest)
    _check_fits(directory, manifest, base, precision | ({"dtype": base.precision["dtype"]} if any_dtype else {}))
    plain = plain_options(tuning) if isinstance(tuning, LoraOptions) else tuning
    check_shapes(directory / WEIGHTS, base.stock, plain, entries)
    state = read_state(directory / WEIGHTS)
    if isinstance(tuning, LoraOptions):
        state = {name.removeprefix(_PEFT_PREFIX): value for name, value in state.items()}
    head = state.pop(f"{head_name(base.stock)}.weight", None)
    labels, width = len(manifest["labels"]), base.stock.config.get_text_config().hidden_size
    if head is None or tuple(head.shape) != (labels, width):
        raise BundleError(
            f"{directory / WEIGHTS} must hold a head of shape {(labels, width)}, not "
            f"{None if head is None else tuple(head.shape)}; restore the files that training wrote"
        )
    if isinstance(tuning, LoraOptions):
        deltas = _low_rank(directory, state, tuning, base.stock)
    elif isinstance(tuning, AdapterOptions):
        deltas = _bottlenecks(directory, state, tuning, base.stock)
    elif isinstance(tuning, HeadOptions):
        deltas = {}
        _refuse_rest(directory, state)
    else:
        raise BundleError(
            f"bundle {directory} was trained by method {manifest['method']}, which has a base of its own and cannot "
            "share one; merge it and serve the merged model"
        )
    domain = Domain.of_manifest(manifest["domain"], source=str(directory / MANIFEST))
    check_positions(base.stock.config, domain.stream.max_length)
    device = next(base.stock.parameters()).device
    head = head.float().to(device)
    return LoadedAdapter(
        directory=directory,
        version=digest(manifest),  # the same weights at another scale answer otherwise
        vocabulary=Vocabulary(domain, base.tokenizer),
        calibration=Calibration.from_dict(manifest["calibration"]),
        head=head,
        deltas=deltas,
        size=count_bytes(deltas, head),
    )


def _check_fits(directory: Path, manifest: Mapping[str, Any], base: Base, precision: Mapping[str, Any]) -> None:
    said = str(manifest["base"].get("fingerprint"))
    if said != base.fingerprint:
        raise BundleError(
            f"bundle {directory} was trained on {manifest['base'].get('name')} with fingerprint {said[:16]}..., but "
            f"base {base.name} has {base.fingerprint[:16]}...; serve it on the base that it was trained on"
        )
    said = str(manifest["tokenizer"].get("fingerprint"))
    if said != base.tokenizer_fingerprint and not fits(base.tokenizer, said):
        raise BundleError(
            f"bundle {directory} was trained with a tokenizer of fingerprint {said[:16]}..., but that of base "
            f"{base.name} has {base.tokenizer_fingerprint[:16]}...; use the base's own tokenizer files"
        )
    for key, value in precision.items():
        if value != base.precision[key]:
            raise BundleError(
                f"bundle {directory} was trained on a base with {key} {value!r}, but this one has "
                f"{base.precision[key]!r}; serve it on a base of its own"
            )


def _low_rank(
    directory: Path, state: dict[str, torch.Tensor], tuning: LoraOptions, stock: nn.Module
) -> dict[str, list[Delta]]:
    """Deltas of a LoRA bundle."""
    plain = plain_options(tuning)
    rank, alpha = plain.r, plain.alpha
    scale = alpha / (rank**0.5 if tuning.rslora else rank)
    modules, device = dict(stock.named_modules()), next(stock.parameters()).device
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
    deltas: dict[str, list[Delta]] = {}
    for path, (a, b) in factors.items():
        ratio, bias = None, getattr(modules[path], "bias", None)
        if tuning.dora:
            magnitude = state.pop(f"{path}.lora_magnitude_vector").float().to(device)
            ratio = dora_ratio(modules[path], a, b, scale, magnitude)
        deltas[path] = [LowRank(a, b, scale, ratio, None if bias is None else bias.detach().float())]
    for name in [name for name in state if name.endswith(".bias")]:
        path = name.removesuffix(".bias").removesuffix(".base_layer")
        own = getattr(modules.get(path), "bias", None)
        value = state.pop(name)
        if own is None or own.shape != value.shape:
            raise BundleError(f"{directory / WEIGHTS} has {name!r}, which the base lacks; restore the file")
        deltas.setdefault(path, []).append(Bias(value.float().to(device) - own.detach().float()))
    _refuse_rest(directory, state)
    return deltas


def _bottlenecks(
    directory: Path, state: dict[str, torch.Tensor], tuning: AdapterOptions, stock: nn.Module
) -> dict[str, list[Delta]]:
    """Deltas of a bottleneck bundle."""
    width, device = stock.config.get_text_config().hidden_size, next(stock.parameters()).device
    find_layout(transformer_layers(stock)[0])
    modules, deltas = dict(stock.named_modules()), {}
    for path in sorted({name.split(".adapter.")[0] for name in state if ".adapter." in name}):
        adapter = BottleneckAdapter(width, tuning)
        own = {name: state.pop(f"{path}.adapter.{name}", None) for name in adapter.state_dict()}
        wrong = {name for name, value in adapter.state_dict().items()
                 if own[name] is None or own[name].shape != value.shape}  # fmt: skip
        if wrong or path not in modules:
            raise BundleError(
                f"{directory / WEIGHTS} has no adapter of width {width} and size {tuning.size} for {path!r}; restore "
                "the files that training wrote"
            )
        adapter.load_state_dict(own)
        deltas[path] = [Bottleneck(adapter.to(device), tuning.placement == "parallel")]
    _refuse_rest(directory, state)
    return deltas


def _refuse_rest(directory: Path, state: Mapping[str, torch.Tensor]) -> None:
    if state:
        raise BundleError(
            f"{directory / WEIGHTS} has an unknown tensor {min(state)!r} ({len(state)} in all); train again or copy it "
            "again"
        )
