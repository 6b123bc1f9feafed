"""Contents of a bundle's adapter_model.safetensors and adapter_config.json, from a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmrec_peft.checkpoints.adapter_checks import PEFT_TYPES, adapted_names
from llmrec_peft.checkpoints.manifest import is_pattern
from llmrec_peft.errors import BundleError
from llmrec_peft.models.base import BASES
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.safetensors_header import read_header
from llmrec_peft.models.sharding import is_split, whole_shape
from llmrec_peft.models.stock_parts import head_name
from llmrec_peft.models.tuning_options import LoraOptions


def adapter_tensors(
    classifier: BehaviorClassifier, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of adapter_model.safetensors, on the CPU; for LoRA with PEFT's names and for the original base."""
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
        options = {} if classifier.method_options is None else dataclasses.asdict(classifier.method_options)
        values = {"peft_type": PEFT_TYPES[classifier.method], "task_type": "SEQ_CLS", **options}
    # PEFT looks for this name on the Hub or among paths, where an embedded name is neither.
    values["base_model_name_or_path"] = BASES[base].hub_id if base in BASES else base
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def check_whole(classifier: BehaviorClassifier, state: Mapping[str, torch.Tensor] | None) -> None:
    """Raise BundleError for tensors that are sharded or missing: they would load silently and predict at random."""
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


def check_written(path: Path, tensors: dict[str, torch.Tensor], classifier: BehaviorClassifier) -> None:
    """Read shapes and the head back from disk."""
    from safetensors import safe_open

    shapes = {name: entry.shape for name, entry in read_header(path).items()}
    for name in shapes.keys() | tensors.keys():
        if tuple(shapes.get(name, ())) != tuple(tensors[name].shape):
            raise BundleError(f"{path.name} does not hold {name} as trained; check the disk and save again")
    head, rows = _head_weight(classifier, tensors), len(classifier.labels)
    if head is None or tensors[head].shape[0] != rows:
        shape = None if head is None else tuple(tensors[head].shape)
        raise BundleError(f"the head of {rows} rows is not among the trained tensors (found {shape}); gather it first")
    with safe_open(str(path), framework="pt") as file:
        if head not in file.keys() or not torch.equal(file.get_tensor(head), tensors[head]):  # noqa: SIM118
            raise BundleError(f"{path.name} does not hold the head {head} as trained; check the disk and save again")


def _head_weight(classifier: BehaviorClassifier, names: Mapping[str, Any]) -> str | None:
    """Name of the head's weight matrix (of its last layer, if it has several) among tensor names."""
    head = f"{head_name(classifier.stock)}."
    found = [name for name in names if name.removeprefix("base_model.model.").startswith(head)]
    matrices = sorted(name for name in found if name.endswith("weight"))
    return matrices[-1] if matrices else None
