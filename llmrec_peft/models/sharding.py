"""Sharded parameters: under ZeRO-3 and FSDP each rank holds a part of every parameter.

Code that reads or writes a parameter's numbers outside a forward pass uses these functions. They are collective if a
parameter is sharded: all ranks must call them, in the same order. On whole parameters they cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def _in_zero3(value: torch.Tensor) -> bool:
    return hasattr(value, "ds_id")


def is_split(value: torch.Tensor) -> bool:
    """Whether this rank holds a part of the parameter alone."""
    return _in_zero3(value) or isinstance(value, DTensor)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Inside, the ZeRO-3 parameters among these are whole on every rank; with `write`, rank 0's changes are stored."""
    split = [value for value in parameters if _in_zero3(value)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


def whole_shape(value: torch.Tensor) -> torch.Size:
    """Shape of the whole parameter."""
    return torch.Size(getattr(value, "ds_shape", ())) if _in_zero3(value) else value.shape


def whole(value: nn.Parameter) -> torch.Tensor:
    """The whole parameter, detached: a copy where it is split, else the tensor itself."""
    if isinstance(value, DTensor):
        return cast(DTensor, value.detach()).full_tensor()
    if not _in_zero3(value):
        return value.detach()
    with gathered([value]):
        return value.detach().clone()


def assign(value: nn.Parameter, new: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter; on a split one, each rank keeps its part."""
    with torch.no_grad():
        if isinstance(value, DTensor):
            value.copy_(distribute_tensor(new.to(value.device, value.dtype), value.device_mesh, value.placements))
            return
        with gathered([value], write=True):
            value.copy_(new)


@contextmanager
def splitting_in(dtype: str) -> Iterator[None]:
    """Inside, ZeRO-3 splits a model that is being loaded in `dtype`.

    DeepSpeed reads the format from its own bf16 and fp16 sections, and would make every weight float32 without them.
    """
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    section = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    if section is None or not is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed_config()
    before = config.get(section)
    config[section] = {"enabled": True}
    try:
        yield
    finally:
        if before is None:
            del config[section]
        else:
            config[section] = before


def make_whole(module: nn.Module) -> None:
    """Replace the split parameters of a module by whole ones, in place."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            if _in_zero3(value):
                setattr(part, name, nn.Parameter(whole(value), requires_grad=value.requires_grad))
