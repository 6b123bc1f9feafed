"""A classifier on the meta device: the modules and tensors of a loaded one, without memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.models import attention
from llmrec_peft.models.base import UNTRAINED, base_errors, bnb_config, load_config
from llmrec_peft.models.classifier import BehaviorClassifier, check_precision, quantization_of, with_method
from llmrec_peft.models.requirements import check_layout
from llmrec_peft.models.stock_parts import head_name, is_encoder, modules_named


def meta_classifier(config: MemoryConfig) -> BehaviorClassifier:
    """The classifier that `build_classifier` would build, on the meta device and in training mode.

    Raises:
        ModelError: a base without config.json, or one that the method cannot tune.
        ConfigError: a dtype that the method does not support.
    """
    tuning = config.tuning
    check_precision(config, tuning)
    source = _directory(config.base)
    model_config = copy.deepcopy(load_config(source, trust_remote_code=config.trust_remote_code))
    model_config.num_labels = config.labels
    text = model_config.get_text_config()
    if text.pad_token_id is None:  # Transformers requires one; its number does not change the memory
        model_config.pad_token_id = text.pad_token_id = 0
    model, fresh = _stock(config, model_config)
    quantization = bnb_config(quantization_of(tuning, config))
    if quantization is not None:
        _quantize(model, quantization)
    for name in fresh:
        for module in modules_named(model, name):
            module.float()
    if config.activation_checkpointing:
        # A meta device has no random state to preserve; a real pass keeps 5 KiB a layer.
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with torch.device("meta"):
        labels = [str(number) for number in range(config.labels)]
        classifier = with_method(model, tuning, labels, source, trained=True).train()
    # Block attention for candidates runs on a CPU only.
    if config.device == "gpu" and classifier.config._attn_implementation == attention.NAME:
        stock = classifier.stock
        assert isinstance(stock, PreTrainedModel)
        stock.set_attn_implementation("sdpa")
    return classifier


def _directory(base: str) -> str:
    """The base, or the directory of a config.json that was named in its place."""
    path = Path(base).expanduser()
    return str(path.parent) if path.name == "config.json" and path.is_file() else base


def _stock(config: MemoryConfig, model_config: Any) -> tuple[PreTrainedModel, list[str]]:
    """The stock model, and the names of its modules that a language model's checkpoint lacks, which stay float32."""
    # Flash attention saves what sdpa saves: q, k, v, the output and one number a query and head (Dao et al., 2022).
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
    fresh = sorted({head_name(model), *(untrained if is_encoder(model_config) else ())})
    # As `load_model` leaves it; `with_method` reads it.
    setattr(model, "fresh_modules", fresh)  # noqa: B010 (PreTrainedModel declares no such attribute)
    return model, fresh


def _quantize(model: PreTrainedModel, quantization: Any) -> None:
    """Replace linear layers by 4-bit ones where the loader would, and pack them; shapes are enough for bitsandbytes."""
    import bitsandbytes
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    # bitsandbytes makes its table of 8-bit numbers at the first use and keeps it: that must not be a meta tensor.
    bitsandbytes.functional.quantize_blockwise(torch.zeros(1))
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight = module.weight
            assert isinstance(weight, Params4bit)
            weight.data = weight.data.to(model.dtype)
            weight._quantize("meta")
