"""Bytes of a model's tensors, with shared storages counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn


def tensors_of(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a parameter: itself, and the quantisation constants of a packed 4-bit weight."""
    yield parameter
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in (state.absmax, state.code, state.offset) if value is not None)
        state = state.state2  # of double quantisation: the constants' own constants


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def weights(model: nn.Module, trained: bool) -> list[torch.Tensor]:
    """Tensors of all trained parameters, or of all frozen parameters and the buffers."""
    found = [held for p in model.parameters() if p.requires_grad == trained for held in tensors_of(p)]
    return found if trained else [*found, *model.buffers()]
