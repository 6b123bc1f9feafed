"""A LoRA layer in one step: the result of PEFT's layer, without the copies between its parts.

PEFT's layer scales the adapter's output, adds it to the base's output in a new tensor, and lets autograd add the two
gradients of x. Here the matrix products accumulate in place. The formulas are those of the LoRA paper (Hu et al., 2021,
arXiv 2106.09685); with s the scale, G the gradient of y and g = s G B:

    y = x W^T + b + s (x A^T) B^T
    dB = s G^T (x A^T),  dA = g^T x,  dx = G W + g A

Shape letters: N tokens of the batch, I inputs, O outputs, r rank. W is [O, I], A [r, I], B [O, r].
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import nn


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        flat = x.flatten(0, -2)  # [N, I]
        inner = flat @ a.T  # [N, r]
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        y.addmm_(inner, b.T, alpha=scale)  # [N, O], in place
        ctx.save_for_backward(flat, weight, a, b, inner)
        ctx.scale, ctx.lead = scale, x.shape[:-1]
        return y.unflatten(0, ctx.lead)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, torch.Tensor, torch.Tensor, None]:
        x, weight, a, b, inner = ctx.saved_tensors
        grad = grad.flatten(0, -2)  # G [N, O]
        through = (grad @ b).mul_(ctx.scale)  # g = s G B, [N, r]
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addmm_(through, a).unflatten(0, ctx.lead)  # dx = G W + g A
        # dA = g^T x, dB = s G^T (x A^T); the base's weight and bias are frozen.
        return x_grad, None, None, through.T @ x, (grad.T @ inner).mul_(ctx.scale), None


class FusedLinear(Linear):
    """PEFT's LoRA layer, which computes in one step where `_alone` allows it, and by PEFT's own code elsewhere."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output [..., O] of inputs [..., I]; arguments as PEFT's."""
        name = self._alone(x) if not args and not kwargs else None
        if name is None:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return _Fused.apply(
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )

    def _alone(self, x: torch.Tensor) -> str | None:
        """Name of the only adapter, if one step gives PEFT's result: plain LoRA in training, parameters not sharded."""
        active = self.active_adapters
        if len(active) != 1 or active[0] not in self.lora_A or not torch.is_grad_enabled():
            return None
        (name,) = active
        if self.disable_adapters or self.merged or name in self.lora_variant:
            return None
        dropout = self.lora_dropout[name]
        if self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            return None
        parts = (self.base_layer, self.lora_A[name], self.lora_B[name])
        # A part with hooks must be called, so that they run: ZeRO-3 fetches parameters in hooks.
        if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in parts):
            return None
        base, a, b = cast("tuple[nn.Linear, nn.Linear, nn.Linear]", parts)
        weights = (base.weight, a.weight, b.weight)
        # Only in float32: in other formats the order of the sums changes the result visibly.
        if x.dtype != torch.float32 or x.dim() < 2 or torch.is_autocast_enabled(x.device.type):
            return None
        if any(type(weight) is not nn.Parameter or weight.dtype != x.dtype for weight in weights):
            return None
        biases = [getattr(part, "bias", None) for part in parts]
        if base.weight.requires_grad or (biases[0] is not None and biases[0].requires_grad):
            return None
        if any(bias is not None for bias in biases[1:]) or not (a.weight.requires_grad and b.weight.requires_grad):
            return None
        return name if a.weight.numel() > 0 else None


def fuse_lora(model: nn.Module) -> int:
    """Turn the LoRA layers of a PeftModel into `FusedLinear`; returns how many."""
    found = [module for module in model.modules() if type(module) is Linear]
    for module in found:
        module.__class__ = FusedLinear
    return len(found)
