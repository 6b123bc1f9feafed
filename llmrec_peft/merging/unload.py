"""Unloading an adapter: what it trained goes into the weights of the stock model under it (`merge_and_unload`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.stock_parts import modules_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def unload(classifier: BehaviorClassifier, dtype: torch.dtype) -> PreTrainedModel:
    """Merge all trained weights into the stock model's own, on the CPU in `dtype`; returns the stock model.

    One layer is changed at a time, so that there is no second copy of the weights; the classifier cannot be used
    afterwards. The head, and the modules that a checkpoint lacks beside it, stay float32.

        W' = W + (alpha / r) B A                                   LoRA
        W' = m * (W + (alpha / r) B A) / |W + (alpha / r) B A|     DoRA, with row norms
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    model = classifier.stock
    names = {name: type(module) for name, module in model.named_modules()}
    for name in [name for name, kind in names.items() if issubclass(kind, LoraLayer)]:
        model.set_submodule(name, _without_lora(model.get_submodule(name), dtype))
    for name in [name for name, kind in names.items() if issubclass(kind, ModulesToSaveWrapper)]:
        wrapper = cast("ModulesToSaveWrapper", model.get_submodule(name))
        model.set_submodule(name, wrapper.modules_to_save[wrapper.active_adapters[0]])
    for name in [name for name, module in model.named_modules() if _is_4bit(module)]:
        model.set_submodule(name, _as_written(_dequantized(model.get_submodule(name)), dtype))
    trained = [module for name in cast("list[str]", model.fresh_modules) for module in modules_named(model, name)]
    in_float32 = {id(value) for module in trained for value in module.parameters()}
    for value in model.parameters():
        value.data = value.data.to("cpu", torch.float32 if id(value) in in_float32 else dtype)
    _forget_methods(model)
    return model


def _without_lora(layer: Any, dtype: torch.dtype) -> nn.Module:
    """The layer under a LoRA layer, with the update in its weight. Sums are computed in float32 and rounded once."""
    base = layer.get_base_layer()
    if _is_4bit(base):
        # PEFT would quantise the sum again, which loses as much as the update adds.
        whole = _dequantized(base)
        _add_update(layer, whole)
        return _as_written(whole, dtype)
    original = base.weight.data
    base.weight.data = original.float()
    # Weights are pages of the checkpoint's file until they are written to. Written pages stay in memory as long as the
    # file is open, even if the weight is replaced. So the sum goes in place, or into the old weight's memory, only
    # where its format stays.
    layer.merge(safe_merge=dtype != torch.float32)
    if original.dtype == dtype != torch.float32:
        base.weight.data = original.copy_(base.weight.data)
    return _as_written(base, dtype)


def _add_update(layer: Any, whole: nn.Linear) -> None:
    """Add a LoRA layer's update to a float32 weight [out, in]; with DoRA scale its rows to the trained norms."""
    (adapter,) = layer.active_adapters
    delta = layer.get_delta_weight(adapter).to(whole.weight.device, torch.float32)
    magnitude = layer.lora_magnitude_vector[adapter] if layer.use_dora[adapter] else None
    if magnitude is not None:
        # [out]: trained norm over the norm of W + delta.
        ratio = magnitude.weight / magnitude.get_weight_norm(whole.weight, delta, scaling=1)
    whole.weight.data += delta
    if magnitude is not None:
        whole.weight.data *= ratio[:, None]


def _is_4bit(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def _dequantized(module: Any) -> nn.Linear:
    """A float32 linear layer with the weights that a 4-bit layer computes with, and its `source_cls`.

    The 4-bit layer loses its weights: it refers to itself, and would keep them in memory.
    """
    import bitsandbytes.functional as functional

    weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    del module.weight
    # On the meta device, so that no weight is allocated and initialised first.
    with torch.device("meta"):
        whole = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    whole.weight = nn.Parameter(weight, requires_grad=False)
    whole.bias = module.bias
    source: Any = getattr(module, "source_cls", nn.Linear)
    whole.source_cls = source  # as Transformers notes it: `Conv1D` is transposed
    return whole


def _as_written(module: Any, dtype: torch.dtype) -> nn.Module:
    """The layer as a checkpoint has it: in `dtype`, and transposed back where quantising had transposed a `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    module.weight.data = module.weight.data.to("cpu", dtype)
    if getattr(module, "source_cls", nn.Linear) is not Conv1D:
        return module
    transposed = Conv1D(module.out_features, 0)
    transposed.weight = nn.Parameter(module.weight.data.T.contiguous(), requires_grad=False)
    transposed.bias = module.bias
    return transposed


def _forget_methods(model: Any) -> None:
    """Remove the attributes that mark the model as quantised or adapted, which `save_pretrained` would act upon."""
    if hasattr(model, "peft_config"):
        del model.peft_config
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        model.is_quantized = model.is_loaded_in_4bit = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
