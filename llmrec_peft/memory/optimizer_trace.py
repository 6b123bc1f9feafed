"""Memory of an optimiser's states and of its step, by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.memory.storage_meter import StorageMeter
from llmrec_peft.memory.tensor_bytes import bytes_of


def trace_optimizer(sizes: Sequence[int], config: MemoryConfig, device: str) -> tuple[int, int]:
    """Bytes of the optimiser's states, and peak bytes beyond them of gradient clipping and one step.

    Args:
        sizes: number of elements of each tensor that trains; weights and gradients are float32.
        config: names the optimiser.
        device: `gpu` or `cpu`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), StorageMeter() as meter:
        tensors = [nn.Parameter(torch.empty(size)) for size in sizes]
        for tensor in tensors:
            tensor.grad = torch.empty_like(tensor)
        optimizer = _optimizer(tensors, config.optimizer, device)
        _step(tensors, optimizer)  # the first step allocates the states
        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        static = meter.peak = meter.live
        _step(tensors, optimizer)
        return bytes_of(states), meter.peak - static


def _optimizer(tensors: list[nn.Parameter], name: str, device: str) -> torch.optim.Optimizer:
    """The optimiser that Trainer makes by this name; on a GPU it updates all tensors at once."""
    if name == "sgd":
        return torch.optim.SGD(tensors, lr=1e-3, foreach=device == "gpu")
    if name == "adamw":
        return torch.optim.AdamW(tensors, foreach=device == "gpu")
    from bitsandbytes.optim.adamw import AdamW8bit

    with unset_fake_temporarily():  # it reads the values of its lookup tables
        return AdamW8bit(tensors)


def _step(tensors: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(tensors, 1.0)
    optimizer.step()
