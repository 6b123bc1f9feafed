"""Loading a base as a stock classifier.

"Stock classifier" means Transformers' own `AutoModelForSequenceClassification`: the backbone and a head, without code
of this package.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec_peft.errors import ModelError
from llmrec_peft.models.base import base_errors, load_config, resolve_base
from llmrec_peft.models.base_weights import weight_entries
from llmrec_peft.models.quantization import Quantization, bnb_config
from llmrec_peft.models.requirements import check_layout
from llmrec_peft.models.sharding import make_whole, splitting_in
from llmrec_peft.models.stock_parts import HEAD_NAMES, head_name, head_of, is_encoder, modules_named
from llmrec_peft.models.tensor_files import read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

UNTRAINED = ("pooler", "pre_classifier")
"""Modules of encoders between backbone and head that a language model's checkpoint lacks."""


def load_model(
    base: str,
    num_labels: int,
    *,
    id2label: dict[int, str],
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """Stock `AutoModelForSequenceClassification` of `base` with a float32 head of `num_labels` rows, in eval mode.

    The model gets three attributes:
        fresh_modules: names of the head and of the modules that the checkpoint lacks (BERT's pooler). Every method
            trains them, in float32.
        trained_head: whether the checkpoint is a classifier of these labels in this order, so that its head was read. A
            head of other labels is replaced by a new one.
        unread: names of the checkpoint's tensors that the model does not have.

    Raises:
        ModelError: the base is not there, has no safetensors, lacks weights of the backbone, or has a layout that
            streams cannot use.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(load_config(base, trust_remote_code=trust_remote_code))
    same_labels = list((config.id2label or {}).values()) == list(id2label.values())
    _set_labels(config, num_labels, id2label, pad_token_id)
    with base_errors(base), _quiet_report(), splitting_in(dtype):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            resolve_base(base),
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            quantization_config=bnb_config(quantization),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # of a head with other labels; any other is refused below
            output_loading_info=True,
        )
    check_layout(base, model)
    head = head_name(model)
    other = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    if any(not name.startswith(f"{head}.") for name in other):
        raise ModelError(f"base {base} has weights of other shapes than its config.json says; use a whole checkpoint")
    lacking = _fresh_modules(base, info["missing_keys"])
    model.fresh_modules = sorted({head, *lacking})
    model.unread = sorted(info["unexpected_keys"])
    model.trained_head = same_labels and not other and head not in lacking
    for name in model.fresh_modules:
        for module in modules_named(model, name):
            make_whole(module)  # ZeRO-3 splits them again when training starts
            module.float()
            if is_encoder(config):
                module.register_forward_pre_hook(_as_float32)
    if model.trained_head and dtype != "float32":
        _read_head(model, base)
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit layer in its first forward pass in eval mode, for good:
        # to bfloat16 whatever the compute dtype, and without gradients when training continues.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _set_labels(config: PreTrainedConfig, num_labels: int, id2label: dict[int, str], pad_token_id: int | None) -> None:
    """Set labels and pad token of a configuration, in place."""
    config.num_labels = num_labels
    config.id2label = dict(id2label)
    config.label2id = {label: number for number, label in id2label.items()}
    config.problem_type = "single_label_classification"
    text = config.get_text_config()
    if pad_token_id is None or (is_encoder(config) and text.pad_token_id is not None):
        # An encoder keeps its own: RoBERTa counts positions from it.
        pad_token_id = text.pad_token_id if text.pad_token_id is not None else text.eos_token_id
    config.pad_token_id = text.pad_token_id = pad_token_id[0] if isinstance(pad_token_id, list) else pad_token_id


def _read_head(model: PreTrainedModel, base: str) -> None:
    """Read the head again from the checkpoint: it was loaded in the base's format, and is float32."""
    entries, head = weight_entries(base), head_name(model)
    with torch.no_grad():
        for name, value in head_of(model).named_parameters():
            if f"{head}.{name}" in entries:
                value.copy_(read_tensor(entries[f"{head}.{name}"]))


def _as_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook before a float32 module of a bfloat16 or float16 encoder: converts its inputs."""
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _fresh_modules(base: str, missing: list[str]) -> list[str]:
    """Names of the modules that the checkpoint lacks. Raises ModelError if weights of the backbone are missing."""
    modules = set()
    for name in missing:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part in (*HEAD_NAMES, *UNTRAINED)), None)
        if place is None:
            raise ModelError(
                f"base {base} lacks the weight {name} and {len(missing) - 1} others; use a complete checkpoint"
            )
        modules.add(parts[place])
    return sorted(modules)


@contextlib.contextmanager
def _quiet_report() -> Iterator[None]:
    """Silence Transformers' table of missing weights: the head always is, and `load_model` checks the others."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
