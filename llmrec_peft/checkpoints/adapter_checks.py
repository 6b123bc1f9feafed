"""Checks of a bundle's files before anything is built from them.

A bundle may come from a stranger. So its numbers are bounded, the shapes in the header of its weights are compared with
its options and with the base, and no pattern in it is ever matched.

The metadata of the weights' file hold the format version, the labels and words, the method, the number format, and the
SHA-256 of the domain, of the calibration and of the method's options. behavior.json holds the SHA-256 of the weights'
file, and its own checksum. So an edit of one file contradicts another.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec_peft.checkpoints.checksum import check_file, digest
from llmrec_peft.checkpoints.directory_checks import check_links, read_json, stray_weights
from llmrec_peft.checkpoints.manifest import read_manifest, read_options, refuse_merged
from llmrec_peft.checkpoints.manifest_schema import ADAPTER, CONFIG, FILES, MANIFEST, WEIGHTS
from llmrec_peft.checkpoints.value_schema import check_schema
from llmrec_peft.errors import BundleError, input_errors
from llmrec_peft.messages import shortened
from llmrec_peft.models.safetensors_header import TensorEntry, read_header, read_metadata
from llmrec_peft.models.stock_parts import HEAD_NAMES
from llmrec_peft.models.tensor_files import check_finite
from llmrec_peft.models.tuning_options import AdapterOptions, LoraOptions, MethodOptions, changes_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESTORE = "restore the files that training wrote"
PEFT_TYPES = {"lora": "LORA", "qlora": "LORA", "adapter": "BOTTLENECK", "head": "HEAD", "full": "FULL"}
_FLOATS = ("F32", "BF16", "F16")
_PEFT_PREFIX = "base_model.model."
# Keys of PEFT's configuration that the base decides, or that describe where it was written.
_OF_THE_BASE = ("target_modules", "modules_to_save", "fan_in_fan_out")
_OF_THE_PLACE = ("base_model_name_or_path", "peft_version", "inference_mode")


def adapted_names(stock: nn.Module) -> list[str]:
    """Whole paths of the modules that LoRA adapts, in the names of the stock model without it."""
    found = [path for path, module in stock.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    return sorted(found)


def plain_options(tuning: LoraOptions) -> LoraOptions:
    """Options of the adapter as written: no start that changes the base, and the rank that `plain_factors` gave it."""
    if not changes_base(tuning):
        return tuning
    alpha = tuning.alpha * (2**0.5 if tuning.rslora else 2)
    return dataclasses.replace(tuning, init="default", r=2 * tuning.r, alpha=alpha)


# -- files against each other ------------------------------------------------------------------------


def check_bundle(directory: str | Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Check a bundle's files against each other; returns its manifest and where its tensors lie. No base is read.

    Raises BundleError as `load_trained` does, for all that needs no base.
    """
    directory = Path(directory)
    with reading(directory):
        refuse_merged(directory)
        _check_files(directory)
        manifest = read_manifest(directory, ADAPTER)
        return manifest, check_adapter(directory, manifest)


def reading(directory: Path) -> AbstractContextManager[None]:
    """Turn what a library raises on a bundle's files into a BundleError of one line."""
    return input_errors(BundleError, f"bundle {directory}", RESTORE)


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


def check_adapter(directory: Path, manifest: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Check a bundle's files against its manifest without reading a base; returns the entries of the tensors."""
    path = directory / WEIGHTS
    try:
        entries, metadata = read_header(path), read_metadata(path)
    except ValueError as error:
        raise BundleError(f"{path} {error}; copy it again or train again") from None
    tuning, _ = read_options(directory, manifest)
    config = read_json(directory / CONFIG)
    expected = PEFT_TYPES[manifest["method"]]
    if config.get("peft_type") != expected:
        raise BundleError(
            f"{directory / CONFIG} has peft_type {shortened(repr(config.get('peft_type')))}, but method "
            f"{manifest['method']} has {expected}; {RESTORE}"
        )
    compare_config(directory, _plain_config(manifest["method"], tuning))
    check_metadata(directory / MANIFEST, manifest, metadata)
    _check_entries(path, manifest, tuning, entries)
    for name in (CONFIG, WEIGHTS):
        check_file(directory / name, manifest["files"][name], MANIFEST, RESTORE)
    return entries


def _plain_config(method: str, tuning: MethodOptions) -> dict[str, Any]:
    """Entries of adapter_config.json that follow from the manifest alone; the base decides the others."""
    if not isinstance(tuning, LoraOptions):
        return {"peft_type": PEFT_TYPES[method], "task_type": "SEQ_CLS", **dataclasses.asdict(tuning)}
    from peft import LoraConfig, TaskType

    plain = plain_options(tuning)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=plain.r, lora_dropout=plain.dropout,
        lora_alpha=plain.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r, so a fraction will do
        target_modules=[], layers_to_transform=plain.layers, bias=plain.bias, use_dora=plain.dora,
        use_rslora=plain.rslora,
    )  # fmt: skip
    values = {key: value for key, value in config.to_dict().items() if key not in _OF_THE_BASE}
    return json.loads(json.dumps(values, default=str))


def compare_config(directory: Path, made: Mapping[str, Any]) -> None:
    """Raise BundleError where adapter_config.json differs from `made`, or sets an unknown key.

    Keys of other PEFT versions may be there if they leave something off.
    """
    path = directory / CONFIG
    found = read_json(path)
    for key in sorted(found.keys() - {*_OF_THE_PLACE}):
        if key in made:
            if found[key] in (None, []) and made[key] in (None, []):
                continue  # PEFT writes this list for every mixture, even if it renamed nothing
            if found[key] != made[key] or isinstance(found[key], bool) != isinstance(made[key], bool):
                raise BundleError(f"{path} has {key} {shortened(repr(found[key]))}, but {MANIFEST} gives "
                                  f"{shortened(repr(made[key]))}; {RESTORE}")  # fmt: skip
        elif key in _OF_THE_BASE:
            kinds = {"fan_in_fan_out": bool, "modules_to_save": ([str], None), "target_modules": [str]}
            check_schema(found[key], kinds[key], path, RESTORE, key)
        elif found[key]:
            raise BundleError(f"{path} sets {shortened(repr(key))}, which this version does not know; {RESTORE}")


def _check_entries(
    path: Path, manifest: Mapping[str, Any], tuning: MethodOptions, entries: Mapping[str, TensorEntry]
) -> None:
    """Compare number formats, the head's rows and the rank in the weights' header with the manifest."""
    allowed = ("F32",) if manifest["method"] == "full" else _FLOATS
    for name, entry in entries.items():
        if entry.dtype not in allowed:
            raise BundleError(
                f"{path} has tensor {shortened(name)!r} of number format {entry.dtype}, and weights of method "
                f"{manifest['method']} are {' or '.join(allowed)}; {RESTORE}"
            )
    heads = [name for name in entries if name.removeprefix(_PEFT_PREFIX).split(".")[0] in HEAD_NAMES]
    rows = [entries[name].shape[:1] for name in sorted(heads) if name.endswith("weight")][-1:]
    labels = len(manifest["labels"])
    if rows and rows[0] != (labels,):
        raise BundleError(f"{path} has a head of {rows[0][0] if rows[0] else 0} rows, but {MANIFEST} has {labels} "
                          f"labels; {RESTORE}")  # fmt: skip
    if not rows and labels > 10_000:
        raise BundleError(f"{path} has no head, and {MANIFEST} has {labels} labels; {RESTORE}")


def weights_metadata(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the weights' file: what ties it to behavior.json. Values are texts: JSON of lists, and
    SHA-256 of mappings.

    manifest: entries of behavior.json, of which the labels, the domain, the calibration, the method, its options and
    the model options are read.
    """
    return {
        "format": "pt",
        "format_version": str(ADAPTER.version),
        "labels": json.dumps(manifest["labels"]),
        "words": json.dumps([str(word) for word in manifest["domain"]["outcomes"].values()]),
        "domain_sha256": digest(manifest["domain"]),
        "calibration_sha256": digest(manifest["calibration"]),
        "method": manifest["method"],
        "dtype": manifest["model_options"]["dtype"],
        "method_options_sha256": digest(manifest["method_options"]),
    }


def check_metadata(path: Path, manifest: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Raise BundleError where behavior.json, whose path is `path`, is not the one that the weights were saved with."""
    version = str(manifest["format_version"])
    if metadata.get("format_version", "1") != version:
        raise BundleError(
            f"{path} has format_version {version}, the weights {shortened(metadata.get('format_version', '1'))}; "
            f"{RESTORE}"
        )
    expected = weights_metadata(manifest)
    told = ("labels", "words") if version == "1" else ("labels", "words", "method", "dtype")
    for key in told:
        if metadata.get(key) != expected[key]:
            value = manifest["model_options"][key] if key == "dtype" else manifest[key]
            raise BundleError(
                f"{path} has the {key} {shortened(value)}, the weights {shortened(metadata.get(key))}; {RESTORE}"
            )
    for part in ("domain", "calibration") if version == "1" else ("domain", "calibration", "method_options"):
        found, stated = expected[f"{part}_sha256"], metadata.get(f"{part}_sha256")
        if found != stated:
            raise BundleError(
                f"{path} has a {part} with the SHA-256 {found[:16]}..., but the weights were saved with "
                f"{str(stated)[:16]}...; {RESTORE}"
            )


# -- weights against a base --------------------------------------------------------------------------


def check_shapes(path: Path, stock: PreTrainedModel, tuning: MethodOptions, entries: Mapping[str, TensorEntry]) -> None:
    """Compare a header with the base, before adapters are built: no more is built than the file holds.

    Args:
        path: path of the weights, for messages.
        stock: the base's stock classifier, without adapters.
        tuning: the adapter's options as written (`plain_options`).

    Raises:
        BundleError: a tensor that is missing or of another shape.
    """
    if isinstance(tuning, LoraOptions):
        wanted = _factors(stock, tuning)
    elif isinstance(tuning, AdapterOptions):
        wanted = _bottlenecks(stock, tuning)
    else:
        return
    for name, shape in wanted.items():
        if name not in entries:
            raise BundleError(f"{path} lacks tensor {shortened(name)!r}; train again or copy it again")
        if entries[name].shape != shape:
            raise BundleError(
                f"{path} has tensor {shortened(name)!r} of shape {entries[name].shape}, but the model has {shape}; "
                f"{RESTORE}"
            )


def _factors(stock: PreTrainedModel, tuning: LoraOptions) -> dict[str, tuple[int, ...]]:
    """Shapes of the low-rank factors that PEFT would build, by their names in the file."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    from llmrec_peft.models.lora import lora_config

    config = lora_config(stock, tuning, trained=True)
    wanted: dict[str, tuple[int, ...]] = {}
    for path, module in stock.named_modules():
        if not check_target_module_exists(config, path):
            continue
        if isinstance(module, nn.Embedding):
            names, width, height = ("lora_embedding_A", "lora_embedding_B"), module.num_embeddings, module.embedding_dim
        elif isinstance(module, Conv1D):
            names, (width, height) = ("lora_A.weight", "lora_B.weight"), module.weight.shape
        elif isinstance(module, nn.Linear):
            names, width, height = ("lora_A.weight", "lora_B.weight"), module.in_features, module.out_features
        else:
            continue
        wanted[f"{_PEFT_PREFIX}{path}.{names[0]}"] = (tuning.r, width)
        wanted[f"{_PEFT_PREFIX}{path}.{names[1]}"] = (height, tuning.r)
    return wanted


def _bottlenecks(stock: PreTrainedModel, tuning: AdapterOptions) -> dict[str, tuple[int, ...]]:
    """Shapes of the projections of the blocks that would be built, by their names in the file."""
    from llmrec_peft.models.bottleneck import adapter_paths

    width = stock.config.get_text_config().hidden_size
    wanted: dict[str, tuple[int, ...]] = {}
    for path in adapter_paths(stock, tuning):
        wanted[f"{path}.adapter.down.weight"] = (tuning.size, width)
        wanted[f"{path}.adapter.up.weight"] = (width, tuning.size)
    return wanted


def check_names(path: Path, own: Mapping[str, tuple[int, ...]], entries: Mapping[str, TensorEntry]) -> None:
    """Raise BundleError unless a file holds just the tensors of the model, each of its shape."""
    for what, names in (("lacks", own.keys() - entries.keys()), ("has an unknown", entries.keys() - own.keys())):
        if names:
            raise BundleError(
                f"{path} {what} tensor {shortened(min(names))!r} ({len(names)} in all); train again or copy it again"
            )
    for name, shape in own.items():
        if shape != entries[name].shape:
            raise BundleError(
                f"{path} has tensor {shortened(name)!r} of shape {entries[name].shape}, but the model has {shape}; "
                f"{RESTORE}"
            )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a bundle's weights. Raises BundleError for a number that is not finite."""
    from safetensors.torch import load_file

    state = load_file(path)
    try:
        check_finite(state)
    except ValueError as error:
        raise BundleError(f"{path} {error}; {RESTORE}, or train again") from None
    return state
