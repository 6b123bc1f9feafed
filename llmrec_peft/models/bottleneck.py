"""Bottleneck adapters: a small feed-forward block after, or beside, the sublayers of each layer.

Placements:
- `houlsby`: after attention and after the MLP, before each residual sum (Houlsby et al. 2019, "Parameter-efficient
  transfer learning for NLP").
- `pfeiffer`: after the MLP only (Pfeiffer et al. 2021, "AdapterFusion").
- `parallel`: reads the MLP's input and adds to its output (He et al. 2022, "Towards a unified view of
  parameter-efficient transfer learning").

A sequential block maps a sublayer's output y to y + scale * U f(D y); a parallel one adds scale * U f(D x) for the
input x. D is [size, H], U is [H, size], f the activation. U starts at zero, so an untrained classifier predicts as its
base. The blocks are float32 on every base, a 4-bit one included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec_peft.errors import ModelError
from llmrec_peft.models.stock_parts import backbone_of
from llmrec_peft.models.tuning_options import AdapterOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class Layout:
    """Paths inside one transformer layer: of the attention's output, of the MLP's output, and of what `parallel` wraps.

    The first two are the last modules before each residual sum: the norm after a sublayer, where there is one.

    `residual_input`: the parallel module takes (hidden, residual) and sums them itself, as BERT's output block does;
    else it takes the MLP's input and returns the MLP's output.
    """

    attention: str
    mlp: str
    parallel: str
    residual_input: bool = False


LAYOUTS = (
    Layout("post_attention_layernorm", "post_feedforward_layernorm", "mlp"),  # Gemma 2 and 3, OLMo 2
    Layout("post_self_attn_layernorm", "post_mlp_layernorm", "mlp"),  # GLM 4
    Layout("self_attn", "mlp", "mlp"),  # Llama, Qwen, Mistral, Mixtral, Gemma 1, Phi, OLMo 1, SmolLM3
    Layout("attn", "mlp", "mlp"),  # GPT-2, GPT-J
    Layout("attention", "mlp", "mlp"),  # GPT-NeoX
    Layout("attention.output.dense", "output.dense", "output", residual_input=True),  # BERT, RoBERTa
    Layout("attention.out_lin", "ffn", "ffn"),  # DistilBERT
)
"""Known layer layouts; the first whose paths all exist is used."""


class BottleneckAdapter(nn.Module):
    """scale * U dropout(f(D x)): [..., width] -> [..., width], float32 inside, the input's dtype outside."""

    def __init__(self, width: int, options: AdapterOptions) -> None:
        super().__init__()
        self.down = nn.Linear(width, options.size)
        self.activation = _ACTIVATIONS[options.activation]()
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()
        self.up = nn.Linear(options.size, width)
        self.scale = options.scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds for inputs [..., H]: [..., H]."""
        delta = self.up(self.dropout(self.activation(self.down(x.to(self.down.weight.dtype)))))
        if self.scale != 1.0:
            delta = delta * self.scale
        return delta.to(x.dtype)


class SequentialBottleneck(nn.Module):
    """A sublayer followed by its adapter: y -> y + adapter(y). Attention returns a tuple, whose first element is y."""

    def __init__(self, sublayer: nn.Module, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.sublayer = sublayer
        self.adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The sublayer's result with the adapter applied to its output."""
        result = self.sublayer(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0] + self.adapter(result[0]), *result[1:])
        return result + self.adapter(result)


class ParallelBottleneck(nn.Module):
    """An MLP with its adapter in parallel: x -> MLP(x) + adapter(x)."""

    def __init__(self, sublayer: nn.Module, adapter: BottleneckAdapter, residual_input: bool) -> None:
        super().__init__()
        self.sublayer = sublayer
        self.adapter = adapter
        self.residual_input = residual_input

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The MLP's output plus the adapter's."""
        if self.residual_input:
            # (hidden, residual): the block normalises dense(hidden) + residual, and the residual is the MLP's input.
            (residual,) = args or (kwargs["input_tensor"],)
            return self.sublayer(hidden, residual + self.adapter(residual))
        result = self.sublayer(hidden, *args, **kwargs)
        if isinstance(result, tuple):  # a mixture of experts may return its router's logits too
            return (result[0] + self.adapter(hidden), *result[1:])
        return result + self.adapter(hidden)


def add_adapters(model: PreTrainedModel, options: AdapterOptions) -> None:
    """Put adapters into a stock classifier, in place; they are its only new trainable parameters.

    Raises ModelError for a layout that is not known, naming the modules found, and for layers that do not exist.
    """
    layers = transformer_layers(model)
    layouts = _layouts(layers, options)
    width = model.config.get_text_config().hidden_size
    device = next(layers[0].parameters()).device
    for number, layout in layouts.items():
        for path in _wrapped_paths(layout, options):
            parent_path, _, name = path.rpartition(".")
            parent = layers[number].get_submodule(parent_path)
            sublayer = getattr(parent, name)
            adapter = BottleneckAdapter(width, options).to(device)
            if options.placement == "parallel":
                wrapper: nn.Module = ParallelBottleneck(sublayer, adapter, layout.residual_input)
            else:
                wrapper = SequentialBottleneck(sublayer, adapter)
            setattr(parent, name, wrapper.train(model.training))


def adapter_paths(model: PreTrainedModel, options: AdapterOptions) -> list[str]:
    """Paths of the modules that `add_adapters` would wrap; nothing is built. Raises ModelError as it does."""
    layers = transformer_layers(model)
    root = next(path for path, module in model.named_modules() if module is layers)
    found = _layouts(layers, options).items()
    return [f"{root}.{number}.{path}" for number, layout in found for path in _wrapped_paths(layout, options)]


def _layouts(layers: nn.ModuleList, options: AdapterOptions) -> dict[int, Layout]:
    """From the number of each layer that gets adapters to its layout: a base may have layers of several kinds."""
    if options.layers is not None and max(options.layers) >= len(layers):
        raise ModelError(
            f"layers names layer {max(options.layers)}, but the base has {len(layers)}; use 0 to {len(layers) - 1}"
        )
    numbers = range(len(layers)) if options.layers is None else options.layers
    return {number: find_layout(layers[number]) for number in numbers}


def _wrapped_paths(layout: Layout, options: AdapterOptions) -> list[str]:
    if options.placement == "parallel":
        return [layout.parallel]
    return [layout.mlp] if options.placement == "pfeiffer" else [layout.attention, layout.mlp]


def adapters_of(model: nn.Module) -> Iterator[tuple[str, BottleneckAdapter]]:
    """(path, adapter) of every adapter in a model."""
    for path, module in model.named_modules():
        if isinstance(module, BottleneckAdapter):
            yield path, module


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of layers of a stock classifier's backbone. Raises ModelError if there is no such list."""
    backbone, depth = backbone_of(model), model.config.get_text_config().num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    found = ", ".join(f"{name} ({type(module).__name__})" for name, module in backbone.named_children())
    raise ModelError(
        f"{type(backbone).__name__} has no list of {depth} layers among its modules {found}; set the method to lora"
    )


def find_layout(layer: nn.Module) -> Layout:
    """The known layout of a layer. Raises ModelError naming the layer's modules if none fits."""
    names = {name for name, _ in layer.named_modules()}
    for layout in LAYOUTS:
        if {layout.attention, layout.mlp, layout.parallel} <= names:
            return layout
    found = ", ".join(name for name, _ in layer.named_children())
    raise ModelError(
        f"method adapter knows no place in a {type(layer).__name__}, whose modules are {found}; "
        "set the method to lora with target_modules all-linear"
    )
