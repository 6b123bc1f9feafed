"""What a bundle's weights and options are held to before anything is built of them.

A bundle may be a stranger's. So its numbers are bounded, the shapes in the header of its weights are compared with its
options and with the base, and nothing in it is a pattern that would be matched.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrec_peft.checkpoints.manifest import CONFIG, MANIFEST, WEIGHTS, check_metadata, read_options
from llmrec_peft.checkpoints.sealing import check_schema, sha256
from llmrec_peft.errors import BundleError
from llmrec_peft.messages import shortened
from llmrec_peft.models.base import HEAD_NAMES
from llmrec_peft.models.model_files import read_json
from llmrec_peft.models.tensor_files import TensorEntry, check_finite, read_header, read_metadata
from llmrec_peft.models.tuning_options import AdapterOptions, LoraOptions, MethodOptions, changes_base

PEFT_TYPES = {"lora": "LORA", "qlora": "LORA", "adapter": "BOTTLENECK", "head": "HEAD", "full": "FULL"}
_RESTORE = "restore the files that training wrote"
_FLOATS = ("F32", "BF16", "F16")
_PEFT_PREFIX = "base_model.model."
# Keys of PEFT's configuration that the base decides, and that say where it was made.
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
            f"{manifest['method']} has {expected}; {_RESTORE}"
        )
    compare_config(directory, _plain_config(manifest["method"], tuning))
    check_metadata(directory / MANIFEST, manifest, metadata)
    _check_entries(path, manifest, tuning, entries)
    for name in (CONFIG, WEIGHTS):
        found, said = sha256(directory / name), manifest["files"][name]
        if found != said:
            raise BundleError(
                f"{directory / name} has the SHA-256 {found[:16]}..., but {MANIFEST} says {said[:16]}...; {_RESTORE}"
            )
    return entries


def _plain_config(method: str, tuning: MethodOptions) -> dict[str, Any]:
    """What adapter_config.json must say by a manifest alone, without what the base decides."""
    if not isinstance(tuning, LoraOptions):
        return {"peft_type": PEFT_TYPES[method], "task_type": "SEQ_CLS", **dataclasses.asdict(tuning)}
    from peft import LoraConfig, TaskType

    plain = plain_options(tuning)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=plain.r, lora_alpha=plain.alpha, lora_dropout=plain.dropout,
        target_modules=[], layers_to_transform=plain.layers, bias=plain.bias, use_dora=plain.dora,
        use_rslora=plain.rslora,
    )  # fmt: skip
    values = {key: value for key, value in config.to_dict().items() if key not in _OF_THE_BASE}
    return json.loads(json.dumps(values, default=str))


def compare_config(directory: Path, made: Mapping[str, Any]) -> None:
    """Raise BundleError where adapter_config.json says something else than `made`, or sets what is unknown here.

    Keys of other PEFT versions may be there if they leave something off.
    """
    path = directory / CONFIG
    found = read_json(path)
    for key in sorted(found.keys() - {*_OF_THE_PLACE}):
        if key in made:
            if found[key] in (None, []) and made[key] in (None, []):
                continue  # PEFT lists what it renamed in a mixture, also where that is nothing
            if found[key] != made[key] or isinstance(found[key], bool) != isinstance(made[key], bool):
                raise BundleError(f"{path} has {key} {shortened(repr(found[key]))}, but {MANIFEST} gives "
                                  f"{shortened(repr(made[key]))}; {_RESTORE}")  # fmt: skip
        elif key in _OF_THE_BASE:
            kinds = {"fan_in_fan_out": bool, "modules_to_save": ([str], None), "target_modules": [str]}
            check_schema(found[key], kinds[key], path, _RESTORE, key)
        elif found[key]:
            raise BundleError(f"{path} sets {shortened(repr(key))}, which this version does not know; {_RESTORE}")


def _check_entries(
    path: Path, manifest: Mapping[str, Any], tuning: MethodOptions, entries: Mapping[str, TensorEntry]
) -> None:
    """Compare number formats, the head's rows and the rank in the weights' header with the manifest."""
    allowed = ("F32",) if manifest["method"] == "full" else _FLOATS
    for name, entry in entries.items():
        if entry.dtype not in allowed:
            raise BundleError(
                f"{path} has tensor {shortened(name)!r} of number format {entry.dtype}, and weights of method "
                f"{manifest['method']} are {' or '.join(allowed)}; {_RESTORE}"
            )
    heads = [name for name in entries if name.removeprefix(_PEFT_PREFIX).split(".")[0] in HEAD_NAMES]
    rows = [entries[name].shape[:1] for name in sorted(heads) if name.endswith("weight")][-1:]
    labels = len(manifest["labels"])
    if rows and rows[0] != (labels,):
        raise BundleError(f"{path} has a head of {rows[0][0] if rows[0] else 0} rows, but {MANIFEST} has {labels} "
                          f"labels; {_RESTORE}")  # fmt: skip
    if not rows and labels > 10_000:
        raise BundleError(f"{path} has no head, and {MANIFEST} has {labels} labels; {_RESTORE}")


# -- weights against a base --------------------------------------------------------------------------


def check_shapes(path: Path, stock: nn.Module, tuning: MethodOptions, entries: Mapping[str, TensorEntry]) -> None:
    """Compare a header with the base, before adapters are built: no more is built than the file holds.

    Args:
        path: of the weights, for messages.
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
                f"{_RESTORE}"
            )


def _factors(stock: nn.Module, tuning: LoraOptions) -> dict[str, tuple[int, ...]]:
    """Shapes of the low-rank factors that PEFT would build, by their names in the file."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    from llmrec_peft.models.lora import lora_config

    config, wanted = lora_config(stock, tuning, trained=True), {}
    for path, module in stock.named_modules():
        if not check_target_module_exists(config, path):
            continue
        if isinstance(module, nn.Embedding):
            names, sizes = ("lora_embedding_A", "lora_embedding_B"), (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, Conv1D):
            names, sizes = ("lora_A.weight", "lora_B.weight"), tuple(module.weight.shape)
        elif isinstance(module, nn.Linear):
            names, sizes = ("lora_A.weight", "lora_B.weight"), (module.in_features, module.out_features)
        else:
            continue
        wanted[f"{_PEFT_PREFIX}{path}.{names[0]}"] = (tuning.r, sizes[0])
        wanted[f"{_PEFT_PREFIX}{path}.{names[1]}"] = (sizes[1], tuning.r)
    return wanted


def _bottlenecks(stock: nn.Module, tuning: AdapterOptions) -> dict[str, tuple[int, ...]]:
    """Shapes of the projections of the blocks that would be built, by their names in the file."""
    from llmrec_peft.models.bottleneck import adapter_paths

    width, wanted = stock.config.get_text_config().hidden_size, {}
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
                f"{_RESTORE}"
            )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a bundle's weights. Raises BundleError for a number that is not finite."""
    from safetensors.torch import load_file

    state = load_file(path)
    try:
        check_finite(state)
    except ValueError as error:
        raise BundleError(f"{path} {error}; {_RESTORE}, or train again") from None
    return state
