"""Patches while a step is traced on fake tensors: what reads tensor values, and what DeepSpeed replaces.

Shape letters: B rows, L tokens of a row, T targets of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.models import attention


def synthetic_segment(length: int, candidates: int) -> np.ndarray:
    """Segments, int64 [L], of a row: the first half is prefix, the rest are `candidates` candidates of similar size."""
    places = np.arange(length)
    return np.where(places < length // 2, 0, 1 + (places - length // 2) * candidates // (length - length // 2))


@contextlib.contextmanager
def no_value_reads(config: MemoryConfig) -> Iterator[None]:
    """Replace what reads values of positions and segments, which fake tensors do not have.

    Transformers looks for packed rows in the positions; there are none, as `BehaviorClassifier` gives positions
    0, 1, 2, ... to rows without candidates, and a mask to others. Block attention reads where the candidates lie; it
    gets the layout of `synthetic_segment`.
    """
    from transformers import masking_utils

    def lay_out(
        mask: torch.Tensor, segment: torch.Tensor, attention_mask: torch.Tensor | None, past_seen: torch.Tensor | None
    ) -> None:
        if segment.shape[1] >= attention.SHORT:
            row = synthetic_segment(segment.shape[1], config.targets)
            layouts = [attention.Layout(row) for _ in range(len(segment))]
            setattr(mask, "layouts", layouts)  # noqa: B010 (torch.Tensor declares no such attribute)

    packed, original = masking_utils.find_packed_sequence_indices, attention.lay_out
    masking_utils.find_packed_sequence_indices = lambda *_args, **_kwargs: None
    attention.lay_out = lay_out
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, attention.lay_out = packed, original


class _InputKeepingLinear(torch.autograd.Function):
    """y = x W^T + b, saving x for the backward pass even where W is frozen.

    With G the gradient of y: dx = G W, dW = G^T x, db = sum of G over rows.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.matmul(x, weight.t()) if bias is None else torch.matmul(x, weight.t()).add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            grad.matmul(weight) if needs_x else None,
            flat.t().matmul(x.reshape(-1, x.shape[-1])) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


@contextlib.contextmanager
def deepspeed_linear(config: MemoryConfig) -> Iterator[None]:
    """Under ZeRO-3, DeepSpeed's own linear layer (`memory_efficient_linear`), which saves every input."""

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = _InputKeepingLinear.apply(input, weight, bias)
        return result

    original = nn.functional.linear
    if config.zero == 3:
        nn.functional.linear = linear
    try:
        yield
    finally:
        nn.functional.linear = original
