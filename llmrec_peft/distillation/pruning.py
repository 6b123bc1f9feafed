"""Structured pruning of a stock decoder: fewer neurons in each MLP, fewer groups of attention heads in each layer.

Whole rows and columns are removed, so the result is a stock model of a smaller configuration. Every layer keeps equally
many units, those with the largest score:

    neuron n of a gated MLP:    s_n = ||gate[n, :]|| * ||up[n, :]|| * ||down[:, n]||
    group g of attention heads: s_g = ||v[rows of g, :]|| * ||o[:, columns of g]||

with Euclidean norms. These are products of weight magnitudes along the path through a unit, the magnitude criterion of
Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), for units with several weight matrices. A group is one
key-value head with the query heads that read it (Ainslie et al., "GQA", EMNLP 2023).

Shape letters: H hidden width, N neurons, G groups, Q query heads of a group, D width of a head.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.bottleneck import transformer_layers

_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.no_grad()
def prune(model: PreTrainedModel, mlp: float = 1.0, heads: float = 1.0) -> None:
    """Prune a stock classifier in place, and change its configuration to match.

    Args:
        model: on the CPU, with layers like those of Llama, Qwen2 or Mistral.
        mlp: fraction of each MLP's neurons to keep, in (0, 1].
        heads: fraction of each layer's groups of heads to keep, in (0, 1].

    Raises:
        ModelError: the layers have another structure.
        ConfigError: a fraction outside (0, 1].
    """
    for name, share in (("student.mlp", mlp), ("student.attention", heads)):
        if not 0 < share <= 1:
            raise ConfigError(f"{name} must be above 0 and at most 1; got {share}")
    config = model.config.get_text_config()
    check_form(model)
    if mlp < 1:
        width = max(1, round(config.intermediate_size * mlp))
        for layer in transformer_layers(model):
            _prune_mlp(layer.get_submodule("mlp"), width)
        config.intermediate_size = width
    if heads < 1:
        _prune_heads(transformer_layers(model), config, heads)


def check_prunable(config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """`check_form` for the model that a configuration describes; no weight is read or allocated."""
    with torch.device("meta"):
        check_form(AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code))


def check_form(model: PreTrainedModel) -> None:
    """Raise ModelError unless every layer has a gated MLP and separate q, k, v and o projections."""
    for layer in transformer_layers(model):
        parts = [(getattr(layer, "mlp", None), _MLP), (getattr(layer, "self_attn", None), _ATTENTION)]
        if any(not isinstance(getattr(part, name, None), nn.Linear) for part, names in parts for name in names):
            raise ModelError(
                f"{type(model).__name__} has no layers of gate, up, down, q, k, v and o projections, so it cannot be "
                "pruned; set student.mlp and student.attention to 1"
            )


def _prune_mlp(mlp: nn.Module, width: int) -> None:
    """Keep the `width` best of N neurons: rows of gate and up [N, H], columns of down [H, N]."""
    gate, up, down = _projections(mlp, _MLP)
    # gate and up are [N, H], down is [H, N]: one norm for each neuron.
    score_N = gate.weight.norm(dim=1) * up.weight.norm(dim=1) * down.weight.norm(dim=0)
    kept = score_N.topk(width).indices.sort().values  # sorted: the neurons keep their order
    _keep(gate, rows=kept)
    _keep(up, rows=kept)
    _keep(down, columns=kept)
    if hasattr(mlp, "intermediate_size"):
        setattr(mlp, "intermediate_size", width)  # noqa: B010 (nn.Module declares no such attribute)


def _prune_heads(layers: nn.ModuleList, config: PretrainedConfig, share: float) -> None:
    """Keep the best groups: rows of q [G * Q * D, H], k and v [G * D, H], columns of o [H, G * Q * D]."""
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups  # query heads of a key-value head
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = max(1, round(groups * share))
    for layer in layers:
        attention = layer.get_submodule("self_attn")
        q, k, v, o = _projections(attention, _ATTENTION)
        # Rows of v and columns of o are ordered by group, so a view separates the groups.
        values_G = v.weight.view(groups, -1).norm(dim=1)
        outputs_G = o.weight.t().reshape(groups, -1).norm(dim=1)
        kept = (values_G * outputs_G).topk(count).indices.sort().values
        key_rows, query_rows = _rows_of(kept, width), _rows_of(kept, queries * width)
        _keep(q, rows=query_rows)
        _keep(k, rows=key_rows)
        _keep(v, rows=key_rows)
        _keep(o, columns=query_rows)
        for name, value in (("num_heads", count * queries), ("num_key_value_heads", count)):
            if hasattr(attention, name):
                setattr(attention, name, value)
    # Without head_dim, Transformers would derive it from the new number of heads.
    config.head_dim = width
    config.num_key_value_heads, config.num_attention_heads = count, count * queries


def _projections(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
    """The linear layers of these names; `check_form` has found them all."""
    found = [module.get_submodule(name) for name in names]
    return [layer for layer in found if isinstance(layer, nn.Linear)]


def _rows_of(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of whole blocks of `width` rows each, int64 [blocks * width]."""
    return (blocks[:, None] * width + torch.arange(width)).flatten()


def _keep(layer: nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    """Keep some outputs (rows) or inputs (columns) of a linear layer; its weight is [outputs, inputs]."""
    if rows is not None:
        layer.weight = nn.Parameter(layer.weight[rows].clone(), requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[rows].clone(), requires_grad=layer.bias.requires_grad)
        layer.out_features = len(rows)
    if columns is not None:
        layer.weight = nn.Parameter(layer.weight[:, columns].clone(), requires_grad=layer.weight.requires_grad)
        layer.in_features = len(columns)
