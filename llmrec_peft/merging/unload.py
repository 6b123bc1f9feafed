"""What an adapter trained, put into the weights of the stock model under it."""

from __future__ import annotations

import torch
from torch import nn

from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.stock_parts import fresh_modules_of, modules_named


@torch.no_grad()
def fold(classifier: BehaviorClassifier, dtype: torch.dtype) -> nn.Module:
    """Put all that was trained into the stock model's own weights, on the CPU in `dtype`; returns the stock model.

    One layer is changed at a time, so that no second copy of the weights is made; the classifier cannot be used
    afterwards. What every method trains, the head and what a checkpoint may lack beside it, is float32.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    model = classifier.stock
    names = {name: type(module) for name, module in model.named_modules()}
    for name in [name for name, kind in names.items() if issubclass(kind, LoraLayer)]:
        model.set_submodule(name, _without_lora(model.get_submodule(name), dtype))
    for name in [name for name, kind in names.items() if issubclass(kind, ModulesToSaveWrapper)]:
        wrapper = model.get_submodule(name)
        model.set_submodule(name, wrapper.modules_to_save[wrapper.active_adapters[0]])
    for name in [name for name, module in model.named_modules() if _is_4bit(module)]:
        model.set_submodule(name, _as_written(_dequantized(model.get_submodule(name)), dtype))
    trained = [module for name in fresh_modules_of(model) for module in modules_named(model, name)]
    kept = {id(value) for module in trained for value in module.parameters()}
    for value in model.parameters():
        value.data = value.data.to("cpu", torch.float32 if id(value) in kept else dtype)
    _forget_methods(model)
    return model


def _without_lora(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer under a LoRA layer, with the update in its weight. Sums are made in float32 and rounded once."""
    base = layer.get_base_layer()
    if _is_4bit(base):
        # PEFT would quantise the sum again, which loses as much as the update adds.
        whole = _dequantized(base)
        _add_update(layer, whole)
        return _as_written(whole, dtype)
    held = base.weight.data
    base.weight.data = held.float()
    # Weights are pages of the checkpoint's file until they are written to, and pages that were written to stay in
    # memory as long as the file is open, though the weight be replaced. So the sum is made in place, or into the old
    # weight's memory, only where its format stays.
    layer.merge(safe_merge=dtype != torch.float32)
    if held.dtype == dtype != torch.float32:
        base.weight.data = held.copy_(base.weight.data)
    return _as_written(base, dtype)


def _add_update(layer: nn.Module, whole: nn.Linear) -> None:
    """Add a LoRA layer's update to a float32 weight [out, in]; with DoRA scale its rows to the trained lengths."""
    (adapter,) = layer.active_adapters
    delta = layer.get_delta_weight(adapter).to(whole.weight.device, torch.float32)
    magnitude = layer.lora_magnitude_vector[adapter] if layer.use_dora[adapter] else None
    if magnitude is not None:
        ratio = magnitude.weight / magnitude.get_weight_norm(whole.weight, delta, scaling=1)
    whole.weight.data += delta
    if magnitude is not None:
        whole.weight.data *= ratio[:, None]


def _is_4bit(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def _dequantized(module: nn.Module) -> nn.Linear:
    """A float32 linear layer of the weights that a 4-bit layer computes with; it knows the class it was made from.

    The 4-bit layer loses its weights: it refers to itself, and would keep them in memory.
    """
    import bitsandbytes.functional as functional

    weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    del module.weight
    with torch.device("meta"):
        whole = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    whole.weight = nn.Parameter(weight, requires_grad=False)
    whole.bias = module.bias
    whole.source_cls = getattr(module, "source_cls", nn.Linear)
    return whole


def _as_written(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer as a checkpoint has it: in `dtype`, and transposed again where 4 bits had turned a `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    module.weight.data = module.weight.data.to("cpu", dtype)
    if getattr(module, "source_cls", nn.Linear) is not Conv1D:
        return module
    turned = Conv1D(module.out_features, 0)
    turned.weight = nn.Parameter(module.weight.data.T.contiguous(), requires_grad=False)
    turned.bias = module.bias
    return turned


def _forget_methods(model: nn.Module) -> None:
    """Take away what says that the model is quantised or adapted, which `save_pretrained` would act upon."""
    if hasattr(model, "peft_config"):
        del model.peft_config
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        model.is_quantized = model.is_loaded_in_4bit = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
