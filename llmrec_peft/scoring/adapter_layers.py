"""Layers of an adapter, as functions of the input and output of a module of the base.

Each layer changes, in place, the rows of the module's output that belong to its adapter. So many adapters share one
forward pass: every row goes through the base's own product once, and then through the small products of its adapter.
Shape letters: n tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from llmrec_peft.models.bottleneck import BottleneckAdapter


class AdapterLayer(Protocol):
    """A change of one module's output."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Change `y` in place, the module's output [n, out] for its input `x` [n, in]."""

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the layer."""


class LowRank:
    """LoRA: y += s B A x; with DoRA (Liu et al. 2024) y = m (W x + s B A x) + bias, m = magnitude / |W + s B A|.

    Args:
        a: A [r, in].
        b: B [out, r].
        scale: s.
        ratio: m [out], None without DoRA.
        bias: bias [out] of the base's layer, which m does not scale; None without one.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        ratio: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        # Scale and ratio are folded into B once: the update is x A^T (s m B)^T.
        b = scale * b if ratio is None else scale * ratio[:, None] * b
        self.a = a.T.contiguous()  # [in, r]
        self.b = b.T.contiguous()  # [r, out]
        self.ratio = ratio
        # m (y - bias) + bias = m y + (1 - m) bias
        self.shift = None if ratio is None or bias is None else (1 - ratio) * bias

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        inner = torch.mm(x.to(self.a.dtype), self.a)  # [n, r]
        out = y if y.dtype == self.b.dtype else y.to(self.b.dtype)
        # y already holds W x + bias from the base. All operations are in place: y is a view of the batch.
        if self.ratio is not None:
            out.mul_(self.ratio)
            if self.shift is not None:
                out.add_(self.shift)
        out.addmm_(inner, self.b)
        if out is not y:
            y.copy_(out)

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.a, self.b, self.ratio, self.shift) if tensor is not None]


class Bias:
    """A trained bias that replaces the base's: y += difference [out]."""

    def __init__(self, difference: torch.Tensor) -> None:
        self.difference = difference

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        y.add_(self.difference.to(y.dtype))

    def tensors(self) -> list[torch.Tensor]:
        return [self.difference]


class Bottleneck:
    """A bottleneck adapter: sequential adds adapter(y), parallel adds adapter(x)."""

    def __init__(self, adapter: BottleneckAdapter, parallel: bool) -> None:
        self.adapter = adapter.eval().requires_grad_(False)
        self.parallel = parallel

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        y.add_(self.adapter(x if self.parallel else y))

    def tensors(self) -> list[torch.Tensor]:
        return list(self.adapter.parameters())


def dora_ratio(
    module: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """magnitude / |W + s B A|, the norm over each output's weights; float32 [out]."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    weight = dequantize_module_weight(module).float()
    if isinstance(module, Conv1D):  # GPT-2 stores [in, out]
        weight = weight.T
    return magnitude / torch.linalg.norm(weight + scale * (b @ a), dim=1)


def count_bytes(layers: Mapping[str, list[AdapterLayer]], *others: torch.Tensor) -> int:
    """Bytes of all tensors."""
    tensors = [tensor for group in layers.values() for layer in group for tensor in layer.tensors()]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *others))
