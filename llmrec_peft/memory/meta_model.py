"""A classifier without memory: on the meta device, with the modules and tensors that loading the base would give."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.models import attention
from llmrec_peft.models.base import base_errors, load_config
from llmrec_peft.models.base_model import UNTRAINED
from llmrec_peft.models.building import check_precision, with_method
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.quantization import bnb_config, quantization_of
from llmrec_peft.models.requirements import check_layout
from llmrec_peft.models.stock_parts import head_name, is_encoder, modules_named


def empty_classifier(config: MemoryConfig) -> BehaviorClassifier:
    """The classifier that `build_classifier` would make, on the meta device, in training mode.

    Raises ModelError for a base without config.json, or one that the method cannot take, ConfigError for a dtype that
    the method does not serve.
    """
    tuning = config.tuning
    check_precision(config, tuning)
    source = _directory(config.base)
    model_config = copy.deepcopy(load_config(source, trust_remote_code=config.trust_remote_code))
    model_config.num_labels = config.labels
    text = model_config.get_text_config()
    if text.pad_token_id is None:  # Transformers asks for one; which it is has no bearing on memory
        model_config.pad_token_id = text.pad_token_id = 0
    model = _stock(config, model_config)
    quantization = bnb_config(quantization_of(tuning, config))
    if quantization is not None:
        _quantize(model, quantization)
    for name in model.fresh_modules:
        for module in modules_named(model, name):
            module.float()
    if config.activation_checkpointing:
        # The state of the random numbers is nothing that a meta tensor has; it takes 5 KiB a layer.
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with torch.device("meta"):
        labels = [str(number) for number in range(config.labels)]
        classifier = with_method(model, tuning, labels, source, trained=True).train()
    # Probes are answered in blocks on a CPU alone.
    if config.device == "gpu" and classifier.config._attn_implementation == attention.NAME:
        classifier.stock.set_attn_implementation("sdpa")
    return classifier


def _directory(base: str) -> str:
    path = Path(base).expanduser()
    return str(path.parent) if path.name == "config.json" and path.is_file() else base


def _stock(config: MemoryConfig, model_config: Any) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    # Flash attention keeps what sdpa keeps: q, k, v, the output and one number a query and head (Dao et al. 2022).
    attn = "sdpa" if config.attn == "flash_attention_2" else config.attn
    with base_errors(config.base), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attn,
            trust_remote_code=config.trust_remote_code,
        )
    check_layout(config.base, model)
    untrained = {name.split(".")[-1] for name, _ in model.named_modules()} & set(UNTRAINED)
    model.fresh_modules = sorted({head_name(model), *(untrained if is_encoder(model_config) else ())})
    return model


def _quantize(model: nn.Module, quantization: Any) -> None:
    """Put 4-bit layers where the loader would, and pack them: bitsandbytes knows the shapes of meta tensors."""
    import bitsandbytes
    from transformers.quantizers.auto import AutoHfQuantizer

    # The table of 8-bit numbers is made at its first use and kept: it must not be made on the meta device.
    bitsandbytes.functional.quantize_blockwise(torch.zeros(1))
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight.data = module.weight.data.to(model.dtype)
            module.weight._quantize("meta")


def tensors_of(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """What holds a parameter: itself, and for a packed 4-bit weight its quantisation constants."""
    yield parameter
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in (state.absmax, state.code, state.offset) if value is not None)
        state = state.state2


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def weights(model: nn.Module, trained: bool) -> list[torch.Tensor]:
    """Tensors of all trained parameters, or of all frozen ones and the buffers."""
    found = [held for p in model.parameters() if p.requires_grad == trained for held in tensors_of(p)]
    return found if trained else [*found, *model.buffers()]
