"""LoRA in one step: what PEFT computes, y = x W^T + b + s (x A^T) B^T, without the copies between its parts.

PEFT's layer scales the adapter's output, adds it to the base's in a new tensor, and lets autograd add the two gradients
of x. Here each is accumulated in place by the matrix product itself. The formulas are those of the LoRA paper (Hu et
al., 2021, arXiv 2106.09685); with G the gradient of y, g = s G B:

    dB = s G^T (x A^T),  dA = g^T x,  dx = G W + g A
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scale: float) -> torch.Tensor:
        flat = x.flatten(0, -2)
        inner = flat @ a.T  # [tokens, r]
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, inner)
        ctx.scale, ctx.lead = scale, x.shape[:-1]
        return y.unflatten(0, ctx.lead)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight, a, b, inner = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        through = (grad @ b).mul_(ctx.scale)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addmm_(through, a).unflatten(0, ctx.lead)
        return x_grad, None, None, through.T @ x, (grad.T @ inner).mul_(ctx.scale), None


class FusedLinear(Linear):
    """PEFT's LoRA layer, which takes the one step where nothing asks for more; else it is PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Arguments as PEFT's; float [..., out]."""
        name = self._alone(x) if not args and not kwargs else None
        if name is None:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return _Fused.apply(
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )

    def _alone(self, x: torch.Tensor) -> str | None:
        """The only adapter, if it is a plain one on a plain layer in training, whose parameters lie here whole."""
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
        # Who hooks into a part (ZeRO-3 fetches its parameters so) must see it called.
        if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in parts):
            return None
        base, a, b = parts
        weights = (base.weight, a.weight, b.weight)
        # In float32 alone: elsewhere the order of the sums shows in the answers.
        exact = x.dtype == torch.float32
        plain = exact and all(type(weight) is nn.Parameter and weight.dtype == x.dtype for weight in weights)
        fixed = not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
        whole = plain and fixed and a.bias is None and b.bias is None and a.weight.requires_grad
        whole = whole and b.weight.requires_grad and a.weight.numel() > 0 and x.dim() > 1
        return name if whole and not torch.is_autocast_enabled(x.device.type) else None


def fuse_lora(model: nn.Module) -> int:
    """Let the plain LoRA layers of a PeftModel take the one step; returns how many can."""
    found = [module for module in model.modules() if type(module) is Linear]
    for module in found:
        module.__class__ = FusedLinear
    return len(found)
