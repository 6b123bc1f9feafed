"""Structured pruning of a stock decoder: fewer neurons in each MLP, fewer groups of attention heads in each layer.

What is cut goes as whole rows and columns, so that a stock model of a smaller configuration is left. Every layer keeps
equally many, those of the largest weights: a gated neuron counts the product of the lengths of its three weight
vectors, a group of heads the length of its values' weights times that of its part of the output projection.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.bottleneck import transformer_layers

_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.no_grad()
def prune(model: nn.Module, mlp: float = 1.0, heads: float = 1.0) -> None:
    """Cut a stock classifier in place, and its configuration with it.

    Args:
        model: on the CPU, with layers as Llama, Qwen2 and Mistral have them.
        mlp: share of each MLP's neurons that stays.
        heads: share of each layer's groups of heads (a key head and the query heads that read it) that stays.

    Raises:
        ModelError: layers of another form.
        ConfigError: a share outside (0, 1].
    """
    for name, share in (("student.mlp", mlp), ("student.attention", heads)):
        if not 0 < share <= 1:
            raise ConfigError(f"{name} must be above 0 and at most 1; got {share}")
    config = model.config.get_text_config()
    layers = transformer_layers(model)
    check_form(model)
    if mlp < 1:
        width = max(1, round(config.intermediate_size * mlp))
        for layer in layers:
            _prune_mlp(layer.mlp, width)
        config.intermediate_size = width
    if heads < 1:
        _prune_heads(layers, config, heads)


def check_prunable(config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """As `check_form`, of the model that a configuration describes; no weight is read or made."""
    with torch.device("meta"):
        check_form(AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code))


def check_form(model: nn.Module) -> None:
    """Raise ModelError unless every layer has a gated MLP and projections that can be cut."""
    for layer in transformer_layers(model):
        parts = [(getattr(layer, "mlp", None), _MLP), (getattr(layer, "self_attn", None), _ATTENTION)]
        if any(not isinstance(getattr(part, name, None), nn.Linear) for part, names in parts for name in names):
            raise ModelError(
                f"{type(model).__name__} has no layers of gate, up, down, q, k, v and o projections, so it cannot be "
                "pruned; set student.mlp and student.attention to 1"
            )


def _prune_mlp(mlp: nn.Module, width: int) -> None:
    gate, up, down = (getattr(mlp, name) for name in _MLP)
    score = gate.weight.norm(dim=1) * up.weight.norm(dim=1) * down.weight.norm(dim=0)
    kept = score.topk(width).indices.sort().values
    _keep(gate, rows=kept)
    _keep(up, rows=kept)
    _keep(down, columns=kept)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width


def _prune_heads(layers: nn.ModuleList, config: object, share: float) -> None:
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = max(1, round(groups * share))
    for layer in layers:
        attention = layer.self_attn
        q, k, v, o = (getattr(attention, name) for name in _ATTENTION)
        values = v.weight.view(groups, -1).norm(dim=1)
        outputs = o.weight.t().reshape(groups, -1).norm(dim=1)
        kept = (values * outputs).topk(count).indices.sort().values
        of_keys, of_queries = _spread(kept, width), _spread(kept, queries * width)
        _keep(q, rows=of_queries)
        _keep(k, rows=of_keys)
        _keep(v, rows=of_keys)
        _keep(o, columns=of_queries)
        for name, value in (("num_heads", count * queries), ("num_key_value_heads", count)):
            if hasattr(attention, name):
                setattr(attention, name, value)
    # The width of a head no longer follows from the number of heads.
    config.head_dim = width
    config.num_key_value_heads, config.num_attention_heads = count, count * queries


def _spread(kept: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of whole blocks of `width`."""
    return (kept[:, None] * width + torch.arange(width)).flatten()


def _keep(layer: nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    """Keep some outputs (rows) or inputs (columns) of a linear layer."""
    if rows is not None:
        layer.weight = nn.Parameter(layer.weight[rows].clone(), requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[rows].clone(), requires_grad=layer.bias.requires_grad)
        layer.out_features = len(rows)
    if columns is not None:
        layer.weight = nn.Parameter(layer.weight[:, columns].clone(), requires_grad=layer.weight.requires_grad)
        layer.in_features = len(columns)
